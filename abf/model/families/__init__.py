"""Families of Hugging Face directories: one file each, named as `model_type` in config.json."""
