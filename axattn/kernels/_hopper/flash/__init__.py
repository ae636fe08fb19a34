"""Flash attention over a grid of query or key tiles: prefill and training."""
