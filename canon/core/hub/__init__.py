"""Weights in and out: safetensors, GGUF, tokenizers, and the name maps to released checkpoints."""
