"""Extent policies: one file a `kind`; each says how long the next block is."""
