"""The block sizes of a call on a chip that need not be here."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

from axattn import _jax_compat
from axattn._implementations.chunked import block_sizes as chunks
from axattn.aot._targets import target
from axattn.kernels._hopper.fitting import choose_forward_block_sizes
from axattn.kernels._hopper.primitives import ROWS
from axattn.kernels._tpu.flash import block_sizes
from benchmarks.harness.calls import asked
from benchmarks.harness.tpu_roofline import DEVICES

HOPPER = ("h100", "h200")


class Blocks(NamedTuple):
    """Slots of a block: of queries, and of keys."""

    q: int
    kv: int


@contextlib.contextmanager
def traced_on(where: str) -> Iterator[None]:
    """Code that is traced finds itself on this chip; no compiler is asked.

    Args:
      where: a name in `DEVICES`, a GPU of `axattn.aot.TARGETS`, or ``"cpu"``: the device at hand.

    Raises:
      ValueError: there is no such target.
    """
    chip = target(where)
    if chip.platform == "cpu":
        yield
        return
    if chip.gpu is None:
        device = (*DEVICES[where], "tpu", None)
    else:
        capability = "{}.{}".format(*chip.gpu.compute_capability)
        device = (chip.description, chip.gpu.multiprocessors, "gpu", capability)
    with _jax_compat.use_abstract_device(*device):
        yield


def tpu_chip(where: str) -> _jax_compat.TpuChip:
    """What the kernels know of a TPU."""
    with traced_on(where):
        return _jax_compat.find_tpu_chip()


def forward(where: str, *shapes: Any, **options: Any) -> Blocks:
    """Blocks of the forward pass of a call with many queries: of the kernel for that chip, or of
    ``"xla_chunked"`` on ``"cpu"``.

    Args:
      where: ``"cpu"``, a TPU, or one of `HOPPER`.
      *shapes: query, key and value.
      **options: of `axattn.dot_product_attention`.

    Raises:
      ValueError: there are no kernels for it.
    """
    if where == "cpu":
        found = asked(lambda call: chunks.choose_chunk_sizes(call, "cpu"), *shapes, **options)
        return Blocks(found.q, found.kv)
    if where in DEVICES:
        chip = tpu_chip(where)
        choose = functools.partial(block_sizes.choose_forward_block_sizes, chip=chip)
        found = asked(choose, *shapes, **options)
        return Blocks(found.block_q, found.block_kv)
    if where in HOPPER:
        found = asked(choose_forward_block_sizes, *shapes, **options)
        return Blocks(ROWS * found.warpgroups, found.block_kv)
    known = ", ".join(("cpu", *DEVICES, *HOPPER))
    raise ValueError(f"where takes one of {known}, got {where!r}")
