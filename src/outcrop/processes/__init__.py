"""Child processes: spawn, readiness, restart, end with the parent."""
