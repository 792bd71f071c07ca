"""Policy of edits: drafts to learn from, labels by alignment, gates and their losses; no bound."""
