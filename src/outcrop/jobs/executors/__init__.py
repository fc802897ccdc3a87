"""Where an attempt of a job runs."""
