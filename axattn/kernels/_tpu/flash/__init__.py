"""Flash attention over a grid of blocks: prefill and training."""
