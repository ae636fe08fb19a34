"""``"xla_chunked"``: online softmax over blocks, in plain XLA."""
