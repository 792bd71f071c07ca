"""Adaptive Block Forcing: the instrument, from raw text to a defensible figure."""

__version__ = "0.1.0"
