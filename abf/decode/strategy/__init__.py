"""Strategies: one file a `kind`; each says what to commit at a step."""
