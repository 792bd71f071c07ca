"""Ratios measured side by side in one process; `make bench` writes them to results/."""
