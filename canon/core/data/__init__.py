"""What the systems learn from: assets by name, texts, tokenizers and batches of tokens."""
