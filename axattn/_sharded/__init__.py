"""One call on the devices of a mesh: what each device does, and what it costs.

`axattn.parallel` is the public face. This package lies below `axattn._attention`, which takes calls
here whose arrays have Explicit mesh axes.
"""
