"""Flash attention for Hopper GPUs (sm90a) in Pallas Mosaic-GPU.

    operands      from an AttentionCall to the arrays that the kernels read
    primitives    launches, shared memory, products, layouts: what Mosaic GPU offers
    pipeline      buffers in shared memory between a producer and its consumers
    kv_loader, dequantize   keys and values of arrays or of a cache: how blocks of them come into
                  shared memory, and how they become operands of the tensor core
    scores, softmax   one tile of scores in registers: bias, cap, mask, dropout; online softmax
    block_sizes, fitting   block sizes and pipeline stages, from a table or as they fit
    flash/        `forward`, `query_grad`, `key_grad`: the kernels of training and prefill
    split_kv/     `decode`, `mla`: the kernels for few query rows, and `combine` behind them

A kernel's file has its producer and its consumers, as loops with waits and releases. Only `decode`
and `mla` share a producer, in `mainloop`.

Needs jax 0.11 or later. The kernels run on the GPU, in the Pallas GPU interpreter on a CPU, and
compile for an absent H100 or H200 (`axattn.aot`).
"""
