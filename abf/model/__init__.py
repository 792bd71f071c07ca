"""One decoder-only transformer, its attention seam, caches, heads and checkpoint conversion."""
