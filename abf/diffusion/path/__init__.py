"""The path from an empty block to a finished one: its law, alignments, and the bound it gives."""
