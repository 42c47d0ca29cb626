"""Claims of the image systems."""
