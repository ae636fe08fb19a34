"""Decode and prompts over every kind of cache, interpreted, against float64.

Slots without a token hold NaN, and unused entries of block tables garbage.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from axattn import Mask
from axattn.kernels._tpu.cached.grid import CachedBlockSizes
from tests.kernels.cached import (
    LENGTHS,
    B,
    K,
    attend_and_check,
    filled,
    in_lanes,
    paged,
    queries,
)
from tests.kernels.conftest import HOPPER, TPU
from tests.tiers import ci, exhaustive

pytestmark = pytest.mark.usefixtures("interpreted")

H = {TPU: 128, HOPPER: 64}

FEATURES = {
    "window": lambda T, S, N: dict(local_window_size=(70, 0)),
    "cap": lambda T, S, N: dict(logits_soft_cap=2.0),
    "sinks": lambda T, S, N: dict(sinks=np.linspace(-1, 2, N).astype(np.float32)),
    "alibi": lambda T, S, N: dict(
        alibi_slopes=np.linspace(0.1, 1, B * N, dtype=np.float32).reshape(B, N), scale=0.2
    ),
    "negative scale": lambda T, S, N: dict(scale=-0.3),
    "prefix": lambda T, S, N: dict(mask=Mask.prefix(9)),
    "segments": lambda T, S, N: dict(
        query_segment_ids=np.full((B, T), 2),
        key_value_segment_ids=np.arange(S)[None] // 52 * [[1]] * B,
    ),
    **{
        name: lambda T, S, N, shape=shape: dict(
            mask=np.random.default_rng(1).random(shape(T, S, N)) < 0.7
        )
        for name, shape in {
            "tree": lambda T, S, N: (B, 1, T, S),
            "mask of heads": lambda T, S, N: (1, N, T, S),
            "mask of keys": lambda T, S, N: (B, 1, 1, S),
        }.items()
    },
    **{
        name: lambda T, S, N, shape=shape: dict(
            bias=np.random.default_rng(2).normal(size=shape(T, S, N)).astype(np.float32)
        )
        for name, shape in {
            "bias": lambda T, S, N: (1, N, T, S),
            "bias of rows": lambda T, S, N: (B, N, T, 1),
            "bias of keys": lambda T, S, N: (1, N, 1, S),
            "bias of all heads": lambda T, S, N: (B, 1, 1, S),
        }.items()
    },
}


def options_of(features, cache, query, lengths):
    """What the door is given, and what the reference: arrays without the slots behind."""
    T, N = query.shape[1:3]
    options = {}
    for name in features:
        options |= FEATURES[name](T, cache.capacity, N)
    reference = dict(options)
    if isinstance(options.get("mask"), Mask):
        reference["prefix"] = 9
        del reference["mask"]
    for name in ("mask", "bias", "key_value_segment_ids"):
        if name in reference and reference[name].shape[-1] > 1:
            reference[name] = reference[name][..., : lengths.max()]
    return options, reference


# Kinds, dtypes and numbers of tokens (a step, a speculative one, the end of a prompt) in pairs. A
# quarter of a lane of features is laid out slots last on TPUs.
ROWS = [
    # kind, dtype, tokens, features, head size on TPUs
    ("dense", "bfloat16", 4, ("tree", "cap", "sinks"), 128),
    ("dense", "int8", 1, ("bias of keys", "alibi"), 64),
    ("dense", "float8_e4m3fn", 20, ("segments",), 128),
    ("dense", "float32", 20, ("mask of heads",), 64),
    ("dense", "int4", 4, ("bias of rows",), 64),
    ("ring", "bfloat16", 1, ("alibi", "window"), 64),
    ("ring", "int8", 20, ("window",), 128),
    ("ring", "float8_e4m3fn", 4, ("cap", "sinks", "window"), 64),
    ("ring", "float32", 1, (), 128),
    ("ring", "int4", 20, ("negative scale",), 128),
    ("paged", "bfloat16", 20, ("bias",), 128),
    ("paged", "int8", 4, ("bias", "segments"), 128),
    ("paged", "float8_e4m3fn", 1, ("negative scale", "prefix"), 128),
    ("paged", "float32", 4, ("mask of keys",), 128),
    ("paged", "int4", 1, ("bias of all heads",), 128),
]
# Where other things than 6 query heads, 2 of keys and values, and pages of 8 are looked at: several
# tiles of rows, sizes that are no powers of two, the largest; pages that are smaller than a block, as
# large, larger, and of a size that no block is a multiple of.
PARTICULAR = {
    (TPU, "dense", "bfloat16"): dict(heads=16, kv_heads=1, value_dim=64, capacity=256),
    (TPU, "dense", "float8_e4m3fn"): dict(head_dim=80, value_dim=48, capacity=256),
    (TPU, "paged", "int8"): dict(page=16),
    (TPU, "paged", "bfloat16"): dict(page=96),
    (HOPPER, "dense", "bfloat16"): dict(heads=16, kv_heads=1, head_dim=128),
    (HOPPER, "dense", "float8_e4m3fn"): dict(heads=4, head_dim=256, value_dim=256),
    (HOPPER, "paged", "bfloat16"): dict(page=256),
    (HOPPER, "paged", "float8_e4m3fn"): dict(page=16),
}
EVERYDAY = ((TPU, "dense", "bfloat16"), (HOPPER, "paged", "int8"))


def test_pairs(family):
    rows = [row for row in ROWS if family == TPU or row[1] not in ("float32", "int4")]
    for i, j in itertools.combinations(range(3), 2):
        every = itertools.product({row[i] for row in rows}, {row[j] for row in rows})
        assert {(row[i], row[j]) for row in rows} == set(every)
    if family == TPU:
        assert {name for row in rows for name in row[3]} == set(FEATURES)


def rows():
    for family in (TPU, HOPPER):
        for row in ROWS:
            if family == HOPPER and row[1] in ("float32", "int4"):
                continue
            marks = [pytest.mark.hopper] if family == HOPPER else []
            if (family, *row[:2]) not in EVERYDAY:
                marks.append(pytest.mark.ci)
            yield pytest.param(family, *row, id=f"{family}-{row[0]}-{row[1]}", marks=marks)


@pytest.mark.parametrize(
    "family, kind, dtype, tokens, features, size", list(rows()), indirect=["family"]
)
def test_kinds(family, kind, dtype, tokens, features, size):
    lengths = np.array([200, 65, 0 if kind == "dense" else 4])
    size = size if family == TPU else H[family]
    particular = dict(PARTICULAR.get((family, kind, dtype), {}))
    heads = particular.pop("heads", 6)
    if "page" in particular:
        cache = paged(particular["page"], dtype, lengths, head_dim=size)
    else:
        slots = in_lanes(kind) if family == TPU and size % 128 else {}
        sizes = dict(head_dim=size, value_dim=size, kv_heads=K, **slots) | particular
        cache = filled(kind, dtype, lengths, **sizes)
    dtype = "float32" if dtype == "float32" else "bfloat16"
    query = queries(tokens, heads, cache.head_dim, dtype=dtype)
    options, reference = options_of(features, cache, query, lengths)
    how = dict(sizes=CachedBlockSizes(2, 128)) if tokens == 4 else None  # of whose tokens a part is
    attend_and_check(family, cache, query, lengths, reference, how, **options)


@pytest.mark.parametrize(
    "dtype, features",
    [
        *ci(("bfloat16", ("window", "tree")), ("int8", ("cap", "sinks"))),
        *exhaustive(("float8_e4m3fn", ("tree",))),
    ],
)
def test_latent(family, dtype, features):
    """Values that are the first features of their keys; rows of two tiles."""
    lengths = np.array([200, 65, 4])
    if family == HOPPER:
        kind, size, slots = "paged", 192, {}
    elif dtype == "int8":
        kind, size, slots = "dense", 192, in_lanes("dense")
    else:
        kind, size, slots = "paged", 256, {}
    sizes = dict(head_dim=size, value_dim=128, kv_heads=1, values_in_keys=True)
    cache = filled(kind, dtype, lengths, **sizes, **slots)
    query = queries(4, 20, size)
    options, reference = options_of(features, cache, query, lengths)
    attend_and_check(family, cache, query, lengths, reference, **options)


@pytest.mark.ci
def test_latent_of_deepseek(family):
    """The real sizes: 576 features, of which 512 are the values."""
    sizes = dict(head_dim=576, value_dim=512, kv_heads=1, values_in_keys=True)
    attend_and_check(family, filled("ring", **sizes, **in_lanes("ring")), queries(1, 16, 576))


FOR_RELEASES = [pytest.mark.hopper, pytest.mark.exhaustive]


@pytest.mark.parametrize(
    "family, head_dim, value_dim, heads, kv_heads, tokens",
    [
        *exhaustive((TPU, 256, 256, 4, 2, 1), (TPU, 64, 128, 8, 8, 1)),
        pytest.param(HOPPER, 80, 48, 6, 2, 2, marks=FOR_RELEASES),
        pytest.param(HOPPER, 64, 128, 8, 8, 1, marks=FOR_RELEASES),
    ],
    indirect=["family"],
)
def test_shapes(family, head_dim, value_dim, heads, kv_heads, tokens):
    cache = filled("dense", head_dim=head_dim, value_dim=value_dim, kv_heads=kv_heads, capacity=256)
    attend_and_check(family, cache, queries(tokens, heads, head_dim))


@pytest.mark.parametrize(
    "family, page, dtype",
    [
        *exhaustive((TPU, 256, "bfloat16"), (TPU, 64, "bfloat16")),
        pytest.param(HOPPER, 96, "int8", marks=FOR_RELEASES),
        pytest.param(HOPPER, 64, "bfloat16", marks=FOR_RELEASES),
    ],
    indirect=["family"],
)
def test_pages(family, page, dtype):
    attend_and_check(family, paged(page, dtype, head_dim=H[family]), queries(2, 6, H[family]))


@pytest.mark.ci
def test_a_center_of_keys(family):
    """With two heads of a group in a tile."""
    size = H[family]
    center = np.random.default_rng(0).normal(size=(K, size)) * 3
    cache = filled("dense", "int8", head_dim=size, value_dim=size, key_center=center)
    attend_and_check(family, cache, queries(20, 8, size), LENGTHS, logits_soft_cap=5.0)
