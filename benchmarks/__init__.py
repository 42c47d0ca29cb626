"""One script per comparison with a peer, both sides in one run."""
