"""The arithmetic's table has a row for each chip, shape and direction, and its numbers make sense."""

from __future__ import annotations

import pytest

from axattn import _jax_compat
from benchmarks.harness import tpu_roofline


@pytest.mark.parametrize("name", tpu_roofline.DEVICES)
def test_rows(name):
    with _jax_compat.use_abstract_device(*tpu_roofline.DEVICES[name], "tpu", None):
        chip = _jax_compat.find_tpu_chip()
    rows = list(tpu_roofline.rows(name, chip, 2048, 16, 2, 128))
    assert [row[3] for row in rows] == list(tpu_roofline.DIRECTIONS)
    for row in rows:
        assert len(row) == len(tpu_roofline.COLUMNS)
        floor, model = (float(cell.split()[0]) for cell in row[8:10])
        assert 0 < floor < model
        assert 0 < float(row[10].rstrip("%")) < 100
    gflop = [float(row[5]) for row in rows]
    # Two products forward, at least five backward.
    assert gflop[1] >= 2.5 * gflop[0] - 1
