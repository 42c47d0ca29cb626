"""How models speak and draw: autoregressive decoding, constrained decoding, beam search."""
