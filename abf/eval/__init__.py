"""Evaluation protocols: one file a `kind`; each turns a run into rows of scores with intervals."""
