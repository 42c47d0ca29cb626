"""Large language models, in the reading list's order."""
