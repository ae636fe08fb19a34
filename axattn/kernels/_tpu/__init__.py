"""Flash attention for TPUs (v4 and later) in Pallas Mosaic-TPU.

    layout   how query rows lie in tiles
    flash    prefill and training: kernels over a grid of blocks
    cached   decode, latent decode and prompts over a cache

`flash` has `grid` (which blocks a step loads), `operands` (the arrays and their blocks), `tile`
(one key/value head in VMEM), `forward` and `backward` (the kernels), `call` (a Pallas call with
refs by name), `block_sizes` (chosen by VMEM and a model of time) and `cost` (for XLA's scheduler).
`cached` has the same for caches, with page copies and dequantization.

The kernels run on a TPU, in the Pallas TPU interpreter on a CPU, and compile for an absent chip
(`axattn.aot`).
"""
