"""Attention where each query sees the union of two contiguous key ranges."""
