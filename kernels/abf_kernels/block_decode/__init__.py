"""Attention of active blocks over paged keys and themselves; `api` is the door."""
