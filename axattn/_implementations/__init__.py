"""The implementations behind :func:`axattn.dot_product_attention`, one file per backend."""
