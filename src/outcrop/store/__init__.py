"""What survives a restart: tables, migrations, guarded writes, the outbox of events."""
