"""Calls as the kernels get them."""

from __future__ import annotations

from tests.kernels.hopper.calls import make_call as call_of

__all__ = ["call_of"]
