"""What programs send: arithmetic over the HLO of small programs, of this CPU and of TPUs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from axattn import aot
from axattn.aot._collectives import count_collectives, parse_group_size
from tests.aot.compilers import need

BYTES = 32 * 64 * 4  # of what one of four devices has


def gathered(x):
    return lax.all_gather(x, "b", axis=0, tiled=True)


def reduced(x):
    return lax.psum(x, "b")


def scattered(x):
    return lax.psum_scatter(x, "b", scatter_dimension=0, tiled=True)


def exchanged(x):
    return lax.all_to_all(x, "b", split_axis=1, concat_axis=0, tiled=True)


def shifted(x, distance=1):
    return lax.ppermute(x, "b", [(i, (i + distance) % 4) for i in range(4)])


def around(x):
    """Three hops in a loop, twice; a compiler may unroll it."""

    def twice(x, _):
        return lax.scan(lambda x, _: (jnp.sin(shifted(x)), None), x, None, length=3)[0], None

    return lax.scan(twice, x, None, length=2)[0]


CASES = {
    "all-gather": (gathered, 1, 3 * BYTES),
    "all-reduce": (reduced, 1, 2 * 3 / 4 * BYTES),
    "reduce-scatter": (scattered, 1, 3 / 4 * BYTES),
    "all-to-all": (exchanged, 1, 3 / 4 * BYTES),
    "collective-permute": (around, 6, 6 * BYTES),
}


def report(fn, target):
    mesh = aot.mesh(target, {"a": 1, "b": 4})
    spec = PartitionSpec("b")
    run = jax.shard_map(fn, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    x = jax.ShapeDtypeStruct((4 * 32, 64), jnp.float32, sharding=NamedSharding(mesh, spec))
    return aot.analyze(run, x, target=target)


@pytest.mark.parametrize("kind", CASES)
def test_bytes_of_each_kind(kind):
    fn, count, sent = CASES[kind]
    r = report(fn, "cpu")
    assert [(c.kind, c.count, c.sent_bytes) for c in r.collectives] == [(kind, count, sent)]


def test_groups_are_not_all_devices():
    mesh = aot.mesh("cpu", {"a": 2, "b": 4})
    spec = PartitionSpec("a", "b")
    run = jax.shard_map(
        lambda x: lax.psum(lax.psum(x, "a"), "b"), mesh=mesh, in_specs=spec,
        out_specs=PartitionSpec(),
    )  # fmt: skip
    x = jax.ShapeDtypeStruct((2, 4), jnp.float32, sharding=NamedSharding(mesh, spec))
    r = aot.analyze(run, x, target="cpu")
    # Once in pairs and once in fours, or, where the compiler joins them, once in eights.
    assert r.sent_bytes in (4 * (2 * 1 / 2 + 2 * 3 / 4), 4 * 2 * 7 / 8)


@pytest.mark.parametrize(
    "text, size",
    [
        ("replica_groups={{0,1},{2,3}}, x={{1}}", 2),
        ("replica_groups={{0,2,4,6}}", 4),
        ("replica_groups=[16,4]<=[64]", 4),
        ("replica_groups=[2,4]<=[4,2]T(1,0), dimensions={1}", 4),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", 4),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}, dimensions={1}", 8),
        ("replica_groups=mesh['a'=2,'b'=8] {'b':(2)4}", 4),
        ("replica_groups={}", 64),
        ("channel_id=1", 64),
    ],
)
def test_replica_groups(text, size):
    assert parse_group_size(text, 64) == size


# What XLA's TPU compiler makes of some: asynchronous operations, and one fused with its user.
TPU = """HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (p: f32[64,8]) -> f32[16,8] {
  %p = f32[64,8]{1,0:T(8,128)} parameter(0)
  %r = f32[64,8]{1,0:T(8,128)} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %s = f32[16,8]{1,0:T(8,128)} slice(%r), slice={[0:16], [0:8]}
}

%gathering (q: bf16[16,8]) -> bf16[64,8] {
  %q = bf16[16,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %g = bf16[64,8]{1,0:T(8,128)(2,1)} all-gather(%q), replica_groups=[1,4]<=[4], dimensions={0}
}

ENTRY %main (x: f32[64,8], y: bf16[16,8], z: s4[16,8], w: pred[16,8]) -> f32[16,8] {
  %x = f32[64,8]{1,0:T(8,128)} parameter(0)
  %y = bf16[16,8]{1,0:T(8,128)(2,1)} parameter(1)
  %z = s4[16,8]{1,0:T(8,128)(8,1)} parameter(2)
  %w = pred[16,8]{1,0:T(8,128)(4,1)} parameter(3)
  %a2a = pred[16,8]{1,0:T(8,128)(4,1)} all-to-all(%w), replica_groups={{0,1,2,3}}, dimensions={0}
  %start = ((bf16[16,8]{1,0}), bf16[64,8]{1,0}, u32[]{:S(2)}) async-start(%y), calls=%gathering
  %cp = (s4[16,8]{1,0}, s4[16,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%z), \
source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %cpd = s4[16,8]{1,0} collective-permute-done(%cp)
  %done = bf16[64,8]{1,0} async-done(%start), calls=%gathering
  ROOT %out = f32[16,8]{1,0:T(8,128)} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_asynchronous_and_fused():
    from jaxlib import _hlo

    found, notes = count_collectives(_hlo.hlo_module_from_text(TPU), 4)
    assert {c.kind: (c.count, c.sent_bytes) for c in found} == {
        "reduce-scatter": (1, 3 / 4 * 64 * 8 * 4),
        "all-gather": (1, 3 * 16 * 8 * 2),
        "collective-permute": (1, 16 * 8 / 2),
        "all-to-all": (1, 3 / 4 * 16 * 8),
    }
    assert [c.sent_bytes for c in found] == sorted((c.sent_bytes for c in found), reverse=True)
    assert notes == ()


def test_of_branches_the_one_that_sends_most():
    def run(x):
        def swapped(x):
            return shifted(x)

        return lax.cond(x[0, 0] > 0, swapped, lambda x: shifted(shifted(jnp.cos(x)), 2), x)

    found = {c.kind: c.count for c in report(run, "cpu").collectives}
    assert found == {"collective-permute": 2}


def test_loops_whose_trips_are_data():
    def run(x):
        return lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: jnp.sin(shifted(x)), x)

    r = report(run, "cpu")
    assert r.sent_bytes == BYTES
    assert r.notes[-1].startswith(
        "what loops send counts once, as the trip count is not known here: a loop at "
    )
    assert "/while: " in r.notes[-1]


@pytest.mark.aot
@pytest.mark.parametrize("kind", ["all-gather", "all-to-all", "collective-permute"])
def test_the_same_of_a_tpu(kind):
    fn, count, sent = CASES[kind]
    r = report(fn, need("v5p"))
    assert [(c.kind, c.count, c.sent_bytes) for c in r.collectives] == [(kind, count, sent)]
