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
# # Inside a kernel
#
# An attention kernel never has all T x S scores at once. It cuts them into blocks that fit the
# memory beside the arithmetic units, and goes from block to block. This notebook follows one call
# on that way: which blocks the mask leaves, how large a block is on which chip and why, what the
# compilers for chips that are not here say of it, whether the result is right, and how fast it
# could be at best. Only the check of the result runs a kernel, on the chip that is here or in
# an interpreter.

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
import dataclasses

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown

import axattn
from axattn import Mask
from axattn.plotting import RooflinePoint, plot_mask, plot_roofline
from benchmarks.harness import (
    committed,
    environment,
    function_rows,
    inputs,
    interpreted,
    jobs,
    kernel_blocks,
    tables,
    tile_calls,
    tile_candidates,
    tile_compile,
    tile_table,
    tpu_blocks,
    units,
)

environment.choose_backend()  # the CPU, where compilers for other chips are all that there is
missing = jobs.missing_compilers(["v5p", "h200"])
for reason in missing.values():
    print(reason)
here = jax.devices()[0]
print(f"axattn {axattn.__version__}, jax {jax.__version__}; runs on: {here.device_kind}")

# %% [markdown]
# ## Masks are data
#
# A `Mask` is a conjunction of parts, not an array. Each part says of any pair (query, key) whether
# it may be, so a picture can be made of it; queries go down, keys to the right. The last picture is
# what a packed batch with a sliding window looks like.

# %%
documents = jnp.array([0] * 9 + [1] * 11 + [2] * 4)
masks = {
    "causal": Mask.causal(),
    "window of 5": Mask.causal() & Mask.window(5, 0),
    "prefix of 8": Mask.prefix(8),
    "three documents": Mask.segments(documents),
    "20 keys are real": Mask.lengths(kv=20),
    "causal, documents, window": Mask.causal() & Mask.segments(documents) & Mask.window(5, 0),
}
figure, axes = plt.subplots(2, 3, figsize=(9, 6.6), layout="constrained")
for ax, (title, mask) in zip(axes.flat, masks.items(), strict=True):
    plot_mask(mask, 24, 24, title=title, ax=ax)

# %% [markdown]
# ## Blocks that are empty, full, partial
#
# For a whole block of queries and keys a mask has three answers, and it has them without looking at
# the elements:
#
# - **empty**: no pair may be. The block is not loaded, nothing is computed.
# - **full**: every pair may be. Two matrix products and a softmax, no mask.
# - **partial**: the elements have to be asked.
#
# The sizes of a block are those that the implementation for a chip takes for such a call.

# %%
LENGTH = 1024 if TINY else 4096


def shapes(length=LENGTH, heads=16, kv_heads=2, size=128):
    query, kv = (jax.ShapeDtypeStruct((1, length, n, size), "bfloat16") for n in (heads, kv_heads))
    return query, kv, kv


CHIPS = ("cpu", "v4", "v5p", "v6e", "h200")
blocks = {chip: kernel_blocks.forward(chip, *shapes(), is_causal=True) for chip in CHIPS}
for chip, block in blocks.items():
    kind = "xla_chunked, on a CPU" if chip == "cpu" else f"the kernel for {chip}"
    print(f"{kind:<22} {block.q:>4} queries x {block.kv} keys")

# %%
cut = np.cumsum(np.array([0.3, 0.45, 0.25]) * LENGTH).astype(int)
long_documents = jnp.asarray(np.searchsorted(cut, np.arange(LENGTH), side="right").clip(0, 2))
long_masks = {
    "causal": Mask.causal(),
    "window of a quarter": Mask.causal() & Mask.window(LENGTH // 4, 0),
    "three documents": Mask.causal() & Mask.segments(long_documents),
}
figure, axes = plt.subplots(1, 3, figsize=(11, 4.4), layout="constrained")
for ax, (title, mask) in zip(axes, long_masks.items(), strict=True):
    q, kv = blocks["v5p"]
    plot_mask(mask, LENGTH, LENGTH, block_q=q, block_kv=kv, title=f"{title}, v5p", ax=ax)

# %% [markdown]
# What is not empty is what is worked on. Smaller blocks follow the mask more closely; they also
# mean more steps, and each has a cost of its own. That is the trade that the next section is about.


# %%
def count_blocks(mask, block):
    states = np.asarray(mask.block_map(LENGTH, LENGTH, *block))  # 0 empty, 1 partial, 2 full
    some, full = (states != 0).mean(), (states == 2).mean()
    return f"{some:.0%} of the blocks, {full:.0%} without a mask"


lines = [
    [title, *(count_blocks(mask, blocks[chip]) for chip in ("v5p", "h200"))]
    for title, mask in long_masks.items()
]
Markdown(tables.plain(["mask", "v5p visits", "h200 visits"], lines))

# %% [markdown]
# ## Who takes the call?
#
# `explain_implementations` says who takes a call, who does not and why, and what `None` would take.
# Code that is traced can be told that it is on another chip.

# %%
for chip in ("cpu", "v5p", "h200"):
    with kernel_blocks.traced_on(chip):
        why = axattn.explain_implementations(*shapes(), is_causal=True)
    place = "here" if chip == "cpu" else f"on {chip}"
    print(f"{place}: mosaic_tpu {why['mosaic_tpu'] or 'takes it'}")
    print(f"{' ' * len(place)}  mosaic_gpu {why['mosaic_gpu'] or 'takes it'}")

# %% [markdown]
# ## How large is a block on a TPU?
#
# A block of queries has all query heads that share a key/value head as its rows: K and V are
# fetched once for the whole group. Larger blocks mean fewer fetches and fewer steps, until they no
# longer fit VMEM. `axattn` estimates both, VMEM from above, for a few candidates and takes the best
# (bold) of those that are not too large for VMEM, or for a compiler that unrolls them (in
# parentheses). The times are a model's, there to rank candidates: no TPU has run this.

# %%
headers, lines = tpu_blocks.grid(
    tpu_blocks.candidates("v5p", *shapes(8192), is_causal=True), least_q=32
)
Markdown(tables.plain(headers, lines))

# %% [markdown]
# libtpu has the last word. The kernel is compiled with the blocks that were taken, and a limit on
# its VMEM that is too small on purpose. What does not fit is a refusal with the bytes that were
# asked for.

# %%
q, kv = blocks["v5p"]
estimate = next(
    one.vmem_bytes for one in tpu_blocks.candidates("v5p", *shapes(), is_causal=True) if one.taken
)
print(f"blocks of {q} x {kv}, estimated at {units.size(estimate)} from above")
for limit in () if "v5p" in missing else (1,) if TINY else (1, 4, 24):
    report = tpu_blocks.compiled("v5p", q, kv, limit << 20, *shapes(), is_causal=True)
    print(f"{limit:>3} MiB of VMEM: {report.refusal or 'compiles'}")
if "v5p" in missing:
    print("libtpu is not installed, so it was not asked")

# %% [markdown]
# ## How large is a block on a Hopper GPU?
#
# There a block is bounded twice: by 227 KiB of shared memory, where keys and values wait, and by
# the registers, where the scores and the output are. Shared memory is arithmetic. Registers are up
# to ptxas: what does not fit is spilled to memory, which costs more than a larger block gains. All
# threads start with the same number of registers; the warpgroups that compute then take more from
# the one that copies. So it is the spilled bytes (per thread) that tell. The sizes in
# `axattn/kernels/_hopper/block_sizes.json` are the largest that spill nothing; the last row asks
# for 176 keys.

# %%
HEAD_SIZES = (128,) if TINY else (64, 128, 256)
places = [tile_candidates.Place("forward", "masked", size, size) for size in HEAD_SIZES]
wanted = [(place, tile_table.tiles_of(place)) for place in places]
too_large = next(tiles for place, tiles in wanted if place.head_dim == 128)
too_large = dataclasses.replace(too_large, block_kv=176, stages=1)
if not TINY:
    wanted.append((tile_candidates.Place("forward", "masked", 128, 128), too_large))


def asked_of_ptxas(place, tiles):
    """Registers and spilled bytes per thread, as ptxas says."""
    kernel, refusal = tile_compile.compile_call(
        place, tiles, tile_calls.TYPICAL[place.kind], "h200"
    )
    return refusal or f"{kernel.registers} registers, {tile_compile.spilled(kernel)} B spilled"


can_ask = "h200" not in missing and jax.__version_info__ >= (0, 11)
lines = [
    [
        str(place.head_dim),
        f"{64 * tiles.warpgroups} x {tiles.block_kv}",
        str(tiles.stages),
        units.size(tile_candidates.shared_bytes(place, tiles)),
    ]
    for place, tiles in wanted
]
if can_ask:
    with tile_compile.reporting("h200"):
        for line, one in zip(lines, wanted, strict=True):
            line.append(asked_of_ptxas(*one))
else:
    print("From benchmarks/results/hopper-kernels.md (2026-11-20):")
    print(committed.section("hopper-kernels.md", "Registers and shared memory").split("\n\n")[0])
headers = ["head size", "queries x keys", "stages", "shared memory", "ptxas, for h200"]
Markdown(tables.plain(headers[: len(lines[0])], lines))

# %% [markdown]
# ## Is it right?
#
# A kernel that was never run is a guess. Pallas interprets kernels on a CPU: the same program,
# block by block, with detection of races between its copies and its arithmetic. It is slow, so the
# call is small. Where a chip is here that the kernel is for, it runs on that chip instead.
#
# The reference is plain attention in float64 on the host. A kernel may be off by twice what plain
# attention in its own precision is off by.


# %%
def in_float64(query, key, value):
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    key, value = (x.repeat(query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    scores = np.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(query.shape[-1])
    scores = np.where(np.tri(*scores.shape[2:], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), value)


given = inputs.attention_inputs(1, 200, 200, heads=4, kv_heads=1, head_dim=64, dtype="bfloat16")
kernel = interpreted.attend(*given, is_causal=True)
plain = axattn.dot_product_attention(*given, is_causal=True, implementation="xla")
right = in_float64(*given)
print(f"ran on: {kernel.where}; races found: {kernel.races}")
for name, out in (("kernel", kernel.out), ("plain", plain)):
    print(f"{name:<7} largest error against float64: {np.abs(out - right).max():.2e}")

# %% [markdown]
# ## How fast can it be at best?
#
# A chip is bound by its arithmetic or by its memory. What a program does per byte that it moves
# says which. Prompts are far to the right: thousands of queries share every key that is loaded. A
# token that is generated reads the whole cache for one query, and stands far to the left. Key/value
# heads that are shared move it to the right, by the size of the group; that is why MQA exists.
#
# Points are hollow: bounds from compiled programs, nothing was measured. FLOPs of the kernel are
# its own estimate, which counts the blocks that it computes.


# %%
def case(name, implementation, **options):
    return name, function_rows.Case(implementation, **options)


step = dict(seq_len=LENGTH, heads=32, batch=8, direction="decode")
cases = [
    case(f"mosaic_tpu, prompt of {LENGTH}", "mosaic_tpu", seq_len=LENGTH),
    case("mosaic_tpu, a token, 8 KV heads", "mosaic_tpu", kv_heads=8, **step),
]
if not TINY:
    cases += [
        case(f"xla, prompt of {LENGTH}", "xla", seq_len=LENGTH),
        case("mosaic_tpu, a token, 32 KV heads", "mosaic_tpu", kv_heads=32, **step),
        case("mosaic_tpu, a token, 1 KV head", "mosaic_tpu", kv_heads=1, **step),
    ]

# %%
if "v5p" not in missing:
    found = [(name, function_rows.compiled(one, "v5p")) for name, one in cases]
else:
    print("Layers, from", committed.provenance("axlearn-v5p-aot.json"))
    rows = committed.rows("axlearn-v5p-aot.json")
    last = [row for row in rows if row["direction"] == "fwd" and row["seq_len"] == 8192]
    found = [(f"{row['implementation']}, layer", row) for row in last]
points = [
    RooflinePoint(
        name,
        row["flops"],
        row["bytes_accessed"],
        is_lower_bound=row["cost_is_lower_bound"],
    )
    for name, row in found
]
axes = plot_roofline(points, target="v5p")

# %% [markdown]
# ## Where to go on
#
# - How the kernels were checked, and what decided their blocks: `benchmarks/results/tpu-kernels.md`
#   and `hopper-kernels.md`.
# - `python benchmarks/tpu_roofline.py` and `python benchmarks/tune_hopper.py --mode=compile` print
#   such tables for other chips and sizes.
# - On a chip: `python benchmarks/kernel_bench.py` checks, then times.
