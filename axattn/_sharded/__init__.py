"""A call on the devices of a mesh: its plan, its program, and a cost model.

`axattn.parallel` is the public face. `axattn._attention` imports this package, for arrays with
Explicit mesh axes.
"""
