"""The choice of blocks: it fits VMEM, and knows what a chip's cores can share."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from axattn import _jax_compat
from axattn.kernels._tpu.flash import block_sizes
from tests.kernels.calls import make_call

CHIPS = {"TPU v4": 2, "TPU v5 lite": 1, "TPU v5": 2, "TPU v6 lite": 1, "TPU7x": 1}


def chip_of(kind):
    with _jax_compat.use_abstract_device(kind, CHIPS[kind], "tpu", None):
        return _jax_compat.find_tpu_chip()


def small(N, K, T=2048, B=1, **options):
    """Make a call with small arrays: only heads and lengths count."""
    return make_call(B, T, T, N, K, 8, is_causal=True, **options)


@pytest.mark.parametrize("N, K", [(16, 2), (8, 8), (28, 4), (71, 1)])
def test_blocks_fit(N, K):
    call = small(N, K)
    for kind, heads_first in itertools.product(CHIPS, (False, True)):
        check_blocks(dataclasses.replace(call, heads_first=heads_first), chip_of(kind))


def check_blocks(call, chip):
    forward, backward = (
        block_sizes.choose_forward_block_sizes(call, chip),
        block_sizes.choose_backward_block_sizes(call, chip),
    )
    first = block_sizes.FUSED if backward.key is None else block_sizes.QUERY_GRAD
    chosen = [(block_sizes.FORWARD, forward), (first, backward.query)]
    if backward.key is not None:
        chosen.append((block_sizes.KEY_GRAD, backward.key))
    for what, found in chosen:
        assert found.vmem_limit < chip.vmem_bytes
        assert (
            block_sizes.estimate_vmem_bytes(call, what, found.block_q, found.block_kv)
            < found.vmem_limit
        )
        assert found.block_kv % block_sizes.LANES == 0 and found.block_q % block_sizes.SUBLANES == 0


def test_one_pass_where_every_core_has_a_share():
    """Of one key/value head and one row, a single pass would leave a core of two idle."""
    two, one = chip_of("TPU v5"), chip_of("TPU v6 lite")
    assert block_sizes.choose_backward_block_sizes(small(8, 1), two).key is not None
    assert block_sizes.choose_backward_block_sizes(small(8, 1), one).key is None
    assert block_sizes.choose_backward_block_sizes(small(16, 2), two).key is None
    # Of four rows each core has two; of three one core waits for a third of the time.
    for rows, one_pass in ((4, True), (3, False)):
        call = small(28, 4, T=8192, B=rows)
        assert (block_sizes.choose_backward_block_sizes(call, two).key is None) == one_pass


def test_two_blocks_of_keys_are_in_flight():
    """Two buffers of keys, and three tiles of float32 scores for 128 rows."""
    longer, shorter = (
        block_sizes.estimate_vmem_bytes(small(8, 1), block_sizes.FORWARD, 16, n) for n in (256, 128)
    )
    keys = 128 * (128 + 128) * 2  # bfloat16; heads of 8 features take 128 lanes
    assert longer - shorter == 2 * keys + 3 * 128 * 128 * 4


def test_one_pass_as_long_as_the_keys_fit():
    chip = chip_of("TPU v5")
    assert block_sizes.choose_backward_block_sizes(small(16, 2, T=4096), chip).key is None
    assert block_sizes.choose_backward_block_sizes(small(16, 2, T=131072), chip).key is not None


def test_small_groups_have_longer_blocks_where_heads_are_first():
    """A step then need not have the keys of eight heads."""
    chip = chip_of("TPU v4")
    call = small(32, 32)
    tokens, heads = (
        block_sizes.choose_forward_block_sizes(dataclasses.replace(call, heads_first=first), chip)
        for first in (False, True)
    )
    assert heads.block_q * heads.block_kv > tokens.block_q * tokens.block_kv


def test_refused_where_nothing_fits():
    from axattn._implementations import mosaic_tpu

    with _jax_compat.use_abstract_device("TPU v4", 2, "tpu", None):
        assert mosaic_tpu.find_refusal(small(8, 2)) is None
        assert "MiB of VMEM" in mosaic_tpu.find_refusal(small(521, 521, T=8))
