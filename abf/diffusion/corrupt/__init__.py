"""Corruptions: one file a `kind`; each turns clean blocks into a noisy stream with targets."""
