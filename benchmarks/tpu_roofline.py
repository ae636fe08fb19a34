"""What the TPU kernels do, by arithmetic: products, HBM traffic, and the time that both bound.

    python benchmarks/tpu_roofline.py                              # v4, v5e, v5p, v6e
    python benchmarks/tpu_roofline.py --target=v5p --lengths=2048,32768

Nothing is run or compiled. A row is a causal call in bfloat16 on one chip, with the blocks that the
kernels would take there. "Reads" is what the kernels read and write in HBM, each block of keys once
per group; "splash" the same for jax's kernel, which reads keys for every query head, with blocks of
512. "Floor" is the longer of products at the peak and of keys, queries and results once through
HBM; "model" the time that the choice of blocks goes by, "MXU" the share of the peak in it.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from axattn import _jax_compat
from benchmarks.harness import command, tpu_roofline

_TARGETS = flags.DEFINE_multi_enum(
    "target", ["v4", "v5e", "v5p", "v6e"], list(tpu_roofline.DEVICES), "chips; repeatable"
)
_LENGTHS = flags.DEFINE_list("lengths", ["8192"], "T = S")
_HEADS = flags.DEFINE_list(
    "heads", ["16/2/128", "32/8/128", "16/8/256", "32/32/128"], "query heads/kv heads/head size"
)


def main(argv: Sequence[str]) -> None:
    del argv  # `command.run` takes none
    try:
        lengths = command.numbers(_LENGTHS)
        every = [command.numbers(_HEADS, text, count=3, split="/") for text in _HEADS.value]
    except ValueError as error:
        raise app.UsageError(str(error)) from None
    table = Table(
        *tpu_roofline.COLUMNS, title="One layer's attention, causal, bfloat16, B=1; arithmetic"
    )
    for name in _TARGETS.value:
        with _jax_compat.use_abstract_device(*tpu_roofline.DEVICES[name], "tpu", None):
            chip = _jax_compat.find_tpu_chip()
        for length in lengths:
            for heads in every:
                for cells in tpu_roofline.rows(name, chip, length, *heads):
                    table.add_row(*cells)
    Console(width=130).print(table)


if __name__ == "__main__":
    command.run(main)
