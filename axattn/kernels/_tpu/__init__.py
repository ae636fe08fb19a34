"""Flash attention for TPUs (v4 and later) in Pallas Mosaic-TPU.

    layout   how query rows lie in tiles
    flash    prefill and training: kernels over a grid of blocks
    cached   decode, latent decode and prompts over a cache

`flash` has `grid` (which blocks a step loads), `blocks` (what it has in VMEM), `operands` (the
arrays), `tile` (one key/value head in VMEM), `forward` and `backward` (the kernels), `call` (a
Pallas call with refs by name), `block_sizes` (chosen by VMEM and a model of time) and `cost` (for
XLA's scheduler). `cached` has the same for caches, with `copies` (blocks from HBM, double-buffered)
and `dequantize`.

The kernels run on a TPU, in the Pallas TPU interpreter on a CPU, and compile for an absent chip
(`axattn.aot`).
"""
