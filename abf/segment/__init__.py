"""Segmenters: one file a `kind`; each turns a document's tokens into segment starts."""
