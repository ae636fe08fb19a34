"""Flash attention for Hopper GPUs (sm90a) in Pallas Mosaic-GPU.

    problem    what is known while tracing, and which operands a call has
    operands   from an AttentionCall to the arrays that the kernels read
    visits     which blocks a tile of rows or of keys visits, and which of them need the mask
    tiles      block sizes and pipeline depths, from a table that is measured or compiled
    device     the few instructions that the GPU interpreter lacks, and shared-memory layouts
    scores     one tile of scores in registers: positions, masks, bias, cap, dropout
    forward, query_grad, key_grad   the three kernels of training and prefill
    decode, latent, merge   the kernels for few query rows: `stream` is what they share, `schedule`
               gives each processor as many keys, `packed` has their rows
    sources, prepare   keys and values of a cache: where they lie, and how they become operands

Needs jax 0.11 or later. The kernels run on the GPU, in the Pallas GPU interpreter on a CPU, and
compile for an absent H100 or H200 (`axattn.aot`).
"""
