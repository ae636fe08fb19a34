# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Long context: one text on many devices
#
# A text that one chip has no room or time for is shared out: each device has a part of the tokens,
# and attention has to bring queries and keys together. Here that is done on eight devices, checked
# against one, and what moves is counted. Where there are no eight accelerators, JAX simulates them
# on the CPU: right results, true counts, and times that mean nothing.

# %% tags=["install"]
# Installs axattn and matplotlib where they are missing. The JAX that is here stays as it is: pip is
# held to the versions of everything that belongs to it, and fails rather than take others.
import importlib.metadata
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile

CHECKOUT = pathlib.Path("../..").resolve()  # where the repository is; change it if it is elsewhere
if not (CHECKOUT / "setup.py").exists():
    raise FileNotFoundError(f"axattn is not in {CHECKOUT}: set CHECKOUT to a clone of it")
if any(importlib.util.find_spec(name) is None for name in ("axattn", "matplotlib")):
    here = {d.name.lower(): d.version for d in importlib.metadata.distributions()}
    kept = [f"{n}=={v}" for n, v in here.items() if n.startswith(("jax", "libtpu", "nvidia-"))]
    with tempfile.TemporaryDirectory() as folder:
        constraints = pathlib.Path(folder, "constraints.txt")
        constraints.write_text("\n".join(kept))
        pip = [sys.executable, "-m", "pip", "install", "-q", "-c", constraints]
        subprocess.run([*pip, "-e", f"{CHECKOUT}[plot]"], check=True)
    importlib.invalidate_caches()
sys.path.insert(0, str(CHECKOUT))  # for `examples` and `benchmarks`, which are not installed
TINY = os.environ.get("AXATTN_TINY") == "1"  # the sizes of the tests

# %%
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.colors import ListedColormap

import axattn
import axattn.linen
from axattn import parallel
from axattn.aot import program_collectives
from axattn.cache import DenseCache
from axattn.plotting import plot_curves
from benchmarks.harness import environment
from benchmarks.harness.plotting import COLORS
from examples import checkpoint, data, sharding
from examples.generation import jit_generate

DEVICES = 8
jax.config.update("jax_num_cpu_devices", DEVICES)  # before the first device is asked for
environment.choose_backend()  # the CPU, where compilers for other chips are all that there is
# (Where JAX_PLATFORMS is set and fewer devices are there, it has to name the CPU, too: "cuda,cpu".)
found = jax.devices() if len(jax.devices()) >= DEVICES else jax.devices("cpu")
devices = found[:DEVICES]
jax.config.update("jax_default_device", devices[0])
# Results are compared below. TPUs and GPUs would otherwise multiply float32 in fewer bits.
jax.config.update("jax_default_matmul_precision", "highest")
print(f"axattn {axattn.__version__}, jax {jax.__version__}, {DEVICES} x {devices[0].device_kind}")

# %%
LENGTH = 512 if TINY else 4096  # tokens
HEADS, KV_HEADS, HEAD_DIM = 16, 2, 32


def make_mesh(**axes):
    types = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), types, devices=devices)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


# %% [markdown]
# ## Three strategies
#
# Which axes of the mesh share out what is said in one place, `parallel.Axes`. Then there are three
# ways to bring queries and keys together:
#
# - `ring`: keys and values travel from device to device while each computes with those that it has;
# - `gather`: every device gets all keys and values, which is cheap where few heads have them;
# - `ulysses`: shards of tokens become shards of heads, and then tokens again.
#
# All of them give what one device gives.

# %%
mesh, axes = make_mesh(context=DEVICES), parallel.Axes(sequence="context")
query = normal(0, 1, LENGTH, HEADS, HEAD_DIM)
key, value = (normal(seed, 1, LENGTH, KV_HEADS, HEAD_DIM) for seed in (1, 2))
alone = axattn.dot_product_attention(query, key, value, is_causal=True)

tokens = NamedSharding(mesh, P(None, "context"))
parts = [jax.device_put(x, tokens) for x in (query, key, value)]
programs = {}
for strategy in ("ring", "gather", "ulysses"):
    attend = functools.partial(
        parallel.attention, axes=axes, mesh=mesh, strategy=strategy, is_causal=True
    )
    programs[strategy] = jax.jit(attend).lower(*parts).compile()
    out = programs[strategy](*parts)
    difference = float(jnp.abs(np.asarray(out) - np.asarray(alone)).max())
    print(f"{strategy:8} shared out as {out.sharding.spec}, differs by {difference:.1e} at most")
    assert difference < 1e-4

# %% [markdown]
# What each of them sends is in the program that XLA made: its collectives, and the bytes that one
# device sends in one run.

# %%
for strategy, program in programs.items():
    collectives, _ = program_collectives(program, DEVICES)
    for sent in collectives:
        print(f"{strategy:8} {sent.count:3} x {sent.kind:20} {sent.sent_bytes / 2**10:8.0f} KiB")

# %% [markdown]
# Two of 16 heads have keys and values here: together a quarter of what the queries take. That is
# why `ring` and `gather`, which move keys and values only, are cheap with grouped-query attention.
#
# ## Which one?
#
# `strategy=None` takes the cheapest by arithmetic: bytes over the links of a chip, FLOPs over its
# peak. `parallel.explain` prints it, of shapes alone; here a million tokens, as large models have
# them, with the rates of a TPU v5p from its data sheet. None of this was run or measured.

# %%
large = [jax.ShapeDtypeStruct((1, 2**20, heads, 128), jnp.bfloat16) for heads in (32, 4, 4)]
explain = functools.partial(parallel.explain, *large, axes=axes, mesh=mesh, is_causal=True)
for layout in ("contiguous", "zigzag"):
    print(layout)
    print(*explain(layout=layout), sep="\n", end="\n\n")

# %% [markdown]
# ## Zigzag
#
# Why is the other layout about twice as fast? Under a causal mask the last tokens see everything
# and the first ones nearly nothing, so of contiguous parts the last device has all the work, and
# the others wait. Zigzag gives each device one part from the front and one from behind. The
# picture: who computes which block of scores, and how many blocks that are.

# %%
figure, plots = plt.subplots(
    2, 2, figsize=(7.5, 5), height_ratios=(3, 1), sharey="row", layout="constrained"
)
for layout, (top, bottom) in zip(("contiguous", "zigzag"), plots.T, strict=True):
    chunks = 2 * DEVICES
    owner = np.empty(chunks)
    owner[parallel.positions(layout, DEVICES, chunks)] = np.arange(chunks) // 2
    causal = np.tril(np.ones((chunks, chunks), bool))
    top.imshow(np.where(causal, owner[:, None], np.nan), cmap=ListedColormap(COLORS))
    top.set(title=layout, xlabel="keys, in 16 parts", ylabel="queries")
    work = [causal[owner == device].sum() for device in range(DEVICES)]
    bottom.bar(range(DEVICES), work, color=COLORS)
    bottom.set(xlabel="device", ylabel="blocks")
    print(f"{layout:10} blocks of the busiest device: {max(work)}, average: {np.mean(work):g}")
plt.show()

# %% [markdown]
# The tokens then lie in the order of `parallel.positions`. Masks, windows and rotary embeddings go
# by positions, so all that is to be done is to bring the tokens into that order.

# %%
order = parallel.positions("zigzag", DEVICES, LENGTH)
zigzag = jax.jit(
    functools.partial(parallel.attention, axes=axes, mesh=mesh, layout="zigzag", is_causal=True)
)
out = zigzag(*(jax.device_put(x[:, order], tokens) for x in (query, key, value)))
difference = float(jnp.abs(np.asarray(out) - np.asarray(alone)[:, order]).max())
print(f"differs by {difference:.1e} at most")
assert difference < 1e-4

# %% [markdown]
# ## A layer, and its gradients
#
# Heads can be shared out at the same time: four parts of the text, times two parts of the heads.
# The layer attends over the mesh by its `attention_fn`, and `logical_axes=True` has its parameters
# name their axes, so that Flax's rules can say where they lie.

# %%
FEATURES = 128
grid = make_mesh(data=1, context=4, model=2)
AXES = sharding.AXES  # batch="data", heads="model", sequence="context"
over_grid = functools.partial(parallel.attention, axes=AXES, mesh=grid)
attention_fn = functools.partial(axattn.linen.dot_product_attention, attend=over_grid)
fields = dict(num_heads=8, num_kv_heads=2, use_bias=False, logical_axes=True)
layer = axattn.linen.GroupedQueryAttention(**fields, attention_fn=attention_fn)
one_device = axattn.linen.GroupedQueryAttention(**fields)

x = normal(3, 2, LENGTH // 4, FEATURES)
boxed = one_device.init(jax.random.key(0), x)
params = nn.unbox(boxed)
rules = (("heads", "model"), ("kv_heads", "model"), ("embed", None), ("head_dim", None))
where = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), grid, rules)
placed = jax.device_put(params, where)
print(f"query kernel {params['params']['query']['kernel'].shape}:", end=" ")
print(placed["params"]["query"]["kernel"].sharding.spec)


# %%
def gradients(layer, params, x):
    return jax.jit(jax.grad(lambda p, x: (layer.apply(p, x, is_causal=True) ** 2).sum()))(params, x)


want = gradients(one_device, params, x)
got = gradients(layer, placed, jax.device_put(x, NamedSharding(grid, P("data", "context"))))
differences = jax.tree.map(
    lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(b).max()), got, want
)
print(f"gradients differ by {max(jax.tree.leaves(differences)):.1e} of the largest at most")
assert max(jax.tree.leaves(differences)) < 1e-4

# %% [markdown]
# ## Generating over a cache in parts
#
# A cache of a long text is shared out as well, token by token, and never moves: a query goes to all
# shards, and their results are added up (flash decoding). The trained model of the examples finds a
# fact in a text whose cache lies on all devices.

# %%
TEXTS, PROMPT = 2, 128 if TINY else 512
prompts, answers = data.needles(0, PROMPT, TEXTS, other_facts=6)
count = answers.shape[1]
model = sharding.placed(checkpoint.load(), grid)
caches = sharding.caches(model.config, grid, TEXTS, PROMPT + count)
given = jax.device_put(prompts, NamedSharding(grid, P()))
generated = jit_generate(model, caches, given, max_new_tokens=count, stop_token=data.STOP)
for prompt, said in zip(prompts, np.asarray(generated.tokens), strict=True):
    print(data.decode(prompt[-7:]), "->", data.decode(said))
assert (np.asarray(generated.tokens) == answers).all()

# %% [markdown]
# How much does a step send? The results of a few queries, however long the text is. The program of
# a step, for caches that are never made:

# %%
everywhere = NamedSharding(grid, P())
step = jax.jit(lambda cache, q, k, v: cache.extend(q, k, v), donate_argnums=0)
one_token = [
    jax.ShapeDtypeStruct((TEXTS, 1, heads, 128), jnp.bfloat16, sharding=everywhere)
    for heads in (32, 4, 4)
]
sent = {}
for length in (2**12, 2**20):
    cache = parallel.ShardedCache.create(
        DenseCache, TEXTS, length, 4, 128, dtype="bfloat16", axes=AXES, mesh=grid, abstract=True
    )
    collectives, _ = program_collectives(step.lower(cache, *one_token).compile(), DEVICES)
    sent[length] = sum(c.sent_bytes for c in collectives)
    print(
        f"{length:8} tokens: {cache.nbytes / DEVICES / 2**20:6.1f} MiB of cache on each device, "
        f"{sent[length] / 2**10:.1f} KiB sent"
    )
assert len(set(sent.values())) == 1

# %% [markdown]
# ## A million tokens
#
# `python benchmarks/scale_bench.py` compiles a grouped-query layer of 1,048,576 tokens for slices
# of TPU v5p that are not here. HBM is what that compiler plans for each chip; the upper picture is
# the least time that FLOPs and HBM traffic take at the chip's peaks. Compiled: nothing was run, and
# no time was measured.

# %%
figure = plot_curves(
    CHECKOUT / "benchmarks/results/scale.json",
    x="chips",
    table="layer",
    kv_heads=4,
    title="A layer of 1,048,576 tokens, per chip; compiled, nothing was run",
)

# %% [markdown]
# The ring holds two parts of the keys at a time, so its memory falls with every chip. Gathered keys
# are whole on each chip, which stops the fall. Ulysses needs as many heads as there are shards, and
# says so (hollow). On several hosts: `python examples/multihost.py --help`.
