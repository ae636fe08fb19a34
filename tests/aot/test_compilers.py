"""The real compilers: libtpu and XLA for CUDA, with no TPU and no GPU here."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from axattn import aot
from tests.aot.compilers import analyze, releases_have_all

pytestmark = pytest.mark.aot

TPUS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
GPUS = ("a100", "h100", "h200", "b200")
Q = jax.ShapeDtypeStruct((1, 1024, 16, 128), jnp.bfloat16)
KV = jax.ShapeDtypeStruct((1, 1024, 2, 128), jnp.bfloat16)
FLOPS = 4 * 1024 * 1024 * 16 * 128  # of attention without skipping


@releases_have_all("name", ["v5e", "tpu7x", "a100", "b200"], TPUS + GPUS)
def test_attention_compiles_everywhere(name):
    r = analyze(jax.nn.dot_product_attention, Q, KV, KV, is_causal=True, target=name)
    assert r.ok, r
    assert r.argument_bytes == 5 * 2**20
    assert r.output_bytes == 4 * 2**20
    assert r.hbm_bytes == r.total_bytes >= 9 * 2**20
    # jaxlib 0.10 cannot read the HLO of a libtpu much newer than itself, and says so.
    if r.flops is None:
        assert "FLOPs and bytes are not known" in r.notes[0]
    else:
        assert FLOPS <= r.flops < 1.1 * FLOPS
        assert "bf16[1,1024,16,128]" in r.hlo_text()
        assert r.bytes_accessed > 9 * 2**20
    assert ("libtpu" if name in TPUS else "jax-cuda13-plugin") in r.versions


@releases_have_all(
    "name, length",
    [("v5p", 32768), ("h200", 65536)],
    ("v5p", "v5e", "h200", "h100"),
    (32768, 65536),
)
def test_out_of_memory_is_data(name, length):
    def loss(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True).astype(jnp.float32).sum()

    q, kv = (jax.ShapeDtypeStruct((1, length, n, 128), jnp.bfloat16) for n in (16, 2))
    r = analyze(jax.grad(loss, (0, 1, 2)), q, kv, kv, target=name)
    assert (r.refusal.kind, r.refusal.memory) == ("out_of_memory", "hbm")
    capacity = aot.target(name).hbm_bytes
    assert r.refusal.requested_bytes > r.refusal.available_bytes
    assert 0.95 * capacity < r.refusal.available_bytes <= capacity
    # One float32 [N, T, S] at the least.
    assert r.refusal.requested_bytes > 4 * 16 * length**2
    if name in TPUS:
        assert r.compiled is None


def test_arguments_alone_can_be_too_large():
    r = analyze(jnp.sin, jax.ShapeDtypeStruct((2**18, 2**18), jnp.float32), target="v5p")
    assert r.refusal.kind == "out_of_memory"
    assert r.refusal.requested_bytes >= 2**38


@pytest.mark.parametrize("name", ["v5p", "h200"])
def test_keys_donation_closures_and_jit(name):
    run = functools.partial(analyze, target=name)
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    constant = jnp.ones((256, 256))
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    assert run(lambda k: jax.random.normal(k, (128, 128)), key).output_bytes == 2**16
    assert run(lambda k: jax.random.normal(k, (128, 128)), jax.random.key(0)).ok
    assert run(lambda x: x @ constant, x).ok
    assert run(lambda x: x @ x, jax.device_put(constant, jax.devices("cpu")[0])).ok
    assert run(jax.jit(lambda x: x + 1, donate_argnums=0), x).alias_bytes == 2**18
    assert run(lambda: jnp.ones((128, 128))).output_bytes == 2**16


@pytest.mark.parametrize("name, times", [("v5p", 3), ("h200", 2), ("cpu", 1)])
def test_the_target_decides_the_branch(name, times):
    def f(x):
        return jax.lax.platform_dependent(
            x,
            cpu=lambda x: x @ x,
            cuda=lambda x: x @ x @ x,
            tpu=lambda x: x @ x @ x @ x,
        )

    r = analyze(f, jax.ShapeDtypeStruct((256, 256), jnp.float32), target=name)
    assert r.flops == pytest.approx(times * 2 * 256**3, rel=0.05)


@pytest.mark.parametrize("name", ["v5p", "h200"])
def test_loops_count_as_often_as_they_run(name, capfd):
    def steps(x, w, n):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=n)[0]

    def nested(x, w):
        return jax.lax.scan(lambda c, _: (steps(c, w, 5) * 2, c.sum()), x, None, length=3)[1].sum()

    x = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    r = analyze(jax.grad(nested), x, x, target=name)
    assert r.flops == pytest.approx(30 * 2 * 512**3, rel=0.05)
    assert not r.cost_is_lower_bound
    assert "stack_frame_id" not in capfd.readouterr().err


def in_new_process(code, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TPU_", "JAX_", "ALLOW_"))}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=env | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


ANALYZE = """
for name in ("v5p", "h200"):
    aot.check_installed(aot.target(name))
    print(name, aot.analyze(jnp.sin, jax.ShapeDtypeStruct((8, 128), jnp.float32), target=name).ok)
print(jnp.ones(3).sum())
"""


@releases_have_all(
    "used_before, platforms", [(False, None), (True, "cpu")], (False, True), (None, "cpu")
)
def test_a_process_of_any_history(platforms, used_before):
    for name in ("v5p", "h200"):
        analyze(jnp.sin, jnp.ones(3), target=name)  # skips without the compilers
    code = "import jax, jax.numpy as jnp\n"
    if used_before:
        code += "jnp.ones(3).sum()\n"
    code += "from axattn import aot\n" + ANALYZE
    done = in_new_process(code, **({"JAX_PLATFORMS": platforms} if platforms else {}))
    assert done.stdout.split() == ["v5p", "True", "h200", "True", "3.0"], done.stderr
    if not used_before or platforms:
        # Nothing about hosts, cuDNN or lock files when axattn is the first to wake the compilers.
        assert done.stderr == ""
