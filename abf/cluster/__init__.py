"""The machine's scheduler: its site settings, its queue and records, and a shared view of jobs."""
