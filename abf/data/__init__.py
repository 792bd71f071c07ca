"""From sources to packed rows: fetch, prepare, tokenizer, tokenize, pack, load."""
