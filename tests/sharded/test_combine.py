"""Combining parts of the keys gives all keys, on one device and over a mesh axis."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import axattn
from axattn._sharded import combine

LENGTHS = np.array([0, 9, 24])  # of rows: without keys, with some in the first part alone, with all


@pytest.fixture(scope="module")
def parts():
    """Attention over each of 4 parts of 24 keys, [part, ...], and over all of them."""
    rng = np.random.default_rng(3)
    q, k, v = (jnp.asarray(rng.normal(size=(3, n, 2, 8)).astype(jnp.float32)) for n in (5, 24, 24))
    attend = axattn.dot_product_attention
    found = [
        attend(
            q, k[:, i : i + 6], v[:, i : i + 6], return_residual=True,
            key_value_seq_lengths=np.clip(LENGTHS - i, 0, 6),
        )
        for i in range(0, 24, 6)
    ]  # fmt: skip
    whole = attend(q, k, v, key_value_seq_lengths=LENGTHS, return_residual=True)
    return jax.tree.map(lambda *x: jnp.stack(x), *found), whole


def check(got, want):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_combine_pair(parts):
    (out, lse), whole = parts
    found = out[0], lse[0]
    for i in range(1, 4):
        found = combine.combine_pair(found, (out[i], lse[i]))
    check(found, whole)


def test_add_sinks(parts):
    """One more score per head, that has no value; rows without keys have it, too."""
    _, (out, lse) = parts
    sinks = np.array([-0.5, 2.0])
    weights = np.exp(np.asarray(lse, np.float64))
    total = weights + np.exp(sinks)
    check(combine.add_sinks((out, lse), jnp.asarray(sinks, jnp.float32)),
          (out * (weights / total)[..., None], np.log(total)))  # fmt: skip


def test_combine_shards(mesh_of, parts):
    (out, lse), whole = parts

    def run(out, lse):
        return combine.combine_shards("context", (out[0], lse[0]))

    combined = jax.shard_map(
        run, mesh=mesh_of(context=4), in_specs=P("context"), out_specs=P(), check_vma=False
    )
    check(combined(out, lse), whole)
