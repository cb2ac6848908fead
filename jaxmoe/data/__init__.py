"""Real text from the disk to token sequences: sources, held-out split, tokenizer, cache, loader."""
