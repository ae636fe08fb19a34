"""Keys and values in fewer bits: one scale per token and head, symmetric, rounded to nearest.

::

    x ~ scale * codes,   scale = max|x| / limit,   limit = 127 (int8), 448 (float8_e4m3fn), 7 (int4)

A scale per token and head is what a cache can keep while it grows, and attention can fold it: a
key's scale multiplies its score, a value's scale its softmax weight, so nothing is dequantized to
memory. float8 codes are stored as bytes: XLA moves bytes in place on every backend, and float8 not
on CPU, where it widens the whole array for one token. It does that to int4, too; but int4 packed by
hand, two to a byte, is copied on TPUs, where half a row of bytes does not fill the lanes.
"""

from axattn._quantization import (
    Quantized,
    bytes_per_vector,
    dequantize,
    key_center,
    quantize,
)

__all__ = [
    "Quantized",
    "bytes_per_vector",
    "dequantize",
    "key_center",
    "quantize",
]
