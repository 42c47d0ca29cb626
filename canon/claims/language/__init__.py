"""Claims of the language systems."""
