"""What was spent: one row per job attempt."""
