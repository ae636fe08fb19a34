"""Flash attention for TPUs (v4 and later) in Pallas Mosaic-TPU.

    cut        how a call is cut into steps of a grid, and which blocks each has
    extent     how many blocks a tile visits, from what a mask says while it is traced
    operands   from an AttentionCall to the blocks that a step has
    layout     how query rows lie in tiles
    tile       one key/value head of a step in VMEM: rows packed, scores with keys first
    scores     what happens between Q K^T and the softmax, whichever way a tile lies
    call       a Pallas call with everything by name
    forward, backward   the kernels of training and prefill
    tiles, cost   block sizes from VMEM and a model of time; what XLA's scheduler is told
    cached     decode, latent decode and prompts over a cache: `cached_cut`, `cached_copies`,
               `cached_operands`, `cached_tile`, `cached_codes` and `cached_tiles` are its parts

They run on a TPU, in the Pallas TPU interpreter on a CPU, and compile for an absent chip
(`axattn.aot`).
"""
