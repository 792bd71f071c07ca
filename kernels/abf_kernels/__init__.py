"""Operators of block diffusion: one folder an operator, each with an oracle beside it."""
