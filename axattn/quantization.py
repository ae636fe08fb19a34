"""Keys and values in fewer bits: one scale per token and head, symmetric, rounded to nearest.

::

    x ~ scale * codes,   scale = max|x| / limit,   limit = 127 (int8), 448 (float8_e4m3fn), 7 (int4)

A cache can keep a scale per token and head while it grows, and attention can fold it: a key's scale
multiplies its score, a value's scale its softmax weight, so nothing is dequantized to memory.

float8 codes are stored as bytes, which XLA moves in place on every backend: on CPU it would widen a
whole float8 array for one token. It widens int4, too. But int4 that is packed by hand, two to a
byte, is copied on TPUs, where half a row of bytes does not fill the lanes.
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
