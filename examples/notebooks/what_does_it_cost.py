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
# # What does it cost, on a chip that you do not have?
#
# The compilers for TPUs and NVIDIA GPUs are wheels. They need no chip, and they say how much memory
# a program takes, and whether it fits, before anyone books a machine. This notebook asks them what
# attention costs: by implementation, by length, by number of key/value heads.
#
# Three kinds of figures, never mixed:
#
# - **HBM** is what the compiler for that chip plans: arguments + outputs + temporaries.
# - **Roofline** is a bound, by arithmetic: the FLOPs at the chip's peak, or the bytes at its
#   bandwidth, whichever takes longer. No run is faster. Nothing is said of how much slower it is.
# - **Time** was measured, on the device that this notebook runs on, and only on that one.

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
import jax
from IPython.display import Markdown

import axattn
from axattn import aot
from axattn.cache import bytes_per_token
from axattn.plotting import plot_curves
from benchmarks.harness import (
    committed,
    environment,
    function_rows,
    jobs,
    layer_cases,
    layer_jobs,
    tables,
    units,
)
from benchmarks.harness.functions import in_direction

environment.choose_backend()  # the CPU, where compilers for other chips are all that there is
missing = jobs.missing_compilers(["v5p", "h200"])
for reason in missing.values():
    print(reason)
if "v5p" in missing:
    print("Shown in its place:", committed.provenance("layers.json"))
here = jax.devices()[0]
print(f"axattn {axattn.__version__}, jax {jax.__version__}; runs on: {here.device_kind}")

# %% [markdown]
# ## The chips
#
# What the vendors publish, per JAX device. Rooflines below are made from the last two columns.

# %%
Markdown(
    tables.plain(
        ["chip", "HBM", "bfloat16", "bandwidth"],
        [
            [
                chip.name,
                units.size(chip.hbm_bytes),
                units.amount(chip.peak_bf16_flops, "FLOP/s"),
                units.amount(chip.hbm_bandwidth, "B/s"),
            ]
            for chip in aot.TARGETS.values()
            if chip.hbm_bytes
        ],
    )
)

# %% [markdown]
# ## One program
#
# `axattn.aot.analyze` takes a function and the shapes of its arguments. Here: causal attention, 16
# query heads that share 2 key/value heads of 128. On a TPU `axattn` takes its Pallas kernel for it.
# The temporaries are K and V once more, in the layout that the kernel reads; nothing has the size
# of T x S.

# %%
LENGTH = 512 if TINY else 8192


def shapes(length):
    query, kv = (jax.ShapeDtypeStruct((1, length, n, 128), "bfloat16") for n in (16, 2))
    return query, kv, kv


if "v5p" not in missing:
    attention = axattn.dot_product_attention
    print(aot.analyze(attention, *shapes(LENGTH), is_causal=True, target="v5p"))

# %% [markdown]
# A program that does not fit is an answer as well, not an exception: `refusal` says which memory,
# how much was asked for and how much there is. This one trains with full logits at 32768 tokens:
# the scores of 16 heads are 64 GiB in float32, the weights made of them 32 GiB in bfloat16.


# %%
def einsum(query, key, value):
    return axattn.dot_product_attention(query, key, value, is_causal=True, implementation="xla")


if "v5p" not in missing:
    train = in_direction(einsum, "fwd+bwd")
    print(aot.analyze(train, *shapes(32768), target="v5p").refusal)

# %% [markdown]
# The same call on other chips, with full logits and with what `axattn` takes there by itself (a
# kernel on each of them). NVIDIA's compiler cannot look into a kernel: its FLOPs are then those by
# arithmetic, and the roofline may be lower than it should be (`>`).

# %%
HEADERS = ["chip", "implementation", "T", "HBM", "temporaries", "roofline", ""]


def line(row):
    seconds = row.get("roofline")
    bound = ">" if seconds and row["cost_is_lower_bound"] else ""
    at_least = bound + units.seconds(seconds)
    sizes = units.size(row["memory_bytes"]), units.size(row["temp_bytes"])
    which = row["where"], row["implementation"], str(row["seq_len"])
    return [*which, *sizes, at_least, row.get("reason") or ""]


chips = [] if TINY else [chip for chip in ("v6e", "h200") if not jobs.missing_compilers([chip])]
cases = [function_rows.Case(name, LENGTH) for name in ("xla", "default")]
others = [function_rows.compiled(case, chip) for chip in chips for case in cases]
Markdown(tables.plain(HEADERS, [line(row) for row in others]) if others else "(none is compiled)")

# %% [markdown]
# ## By implementation and length
#
# `repeat_kv` is what most code does: copy K and V for each query head, then plain attention. `xla`
# shares them and still writes the logits. `xla_chunked` and the kernel never write them: their
# memory grows with T, that of the others with its square. (The roofline is a bound; white markers
# say that the compiler could not count everything.)

# %%
LENGTHS = (128, 256) if TINY else (2048, 8192, 32768)
FORWARD = ("xla", "mosaic_tpu") if TINY else ("repeat_kv", "xla", "xla_chunked", "mosaic_tpu")
TRAINED = ("xla",) if TINY else ("repeat_kv", "mosaic_tpu")

cases = [
    function_rows.Case(name, length, direction=direction)
    for direction, names in (("fwd", FORWARD), ("fwd+bwd", TRAINED))
    for name in names
    for length in (LENGTHS if direction == "fwd" else LENGTHS[-1:])
]
rows = [] if "v5p" in missing else [function_rows.compiled(case, "v5p") for case in cases]

# %%
if rows:
    figure = plot_curves(rows, direction="fwd", title="Attention, forward")
else:
    layers = committed.path("layers.json")
    figure = plot_curves(layers, table="length sweep", where="v5p", title="A layer, forward")

# %% [markdown]
# With gradients. At 32768 tokens the first question is not how fast it is, but whether it runs.

# %%
if not rows:
    print("Whole layers, from", committed.provenance("axlearn-v5p-aot.json"))
    rows = [row for row in committed.rows("axlearn-v5p-aot.json") if row["seq_len"] == 8192]
trained = [row for row in rows if row["direction"] == "fwd+bwd"]
Markdown(tables.plain(HEADERS, [line(row) for row in trained]))

# %% [markdown]
# ## By key/value heads: one token of a long text
#
# Generating reads the whole cache for every token, so the bytes decide. Eight rows of 32768 tokens,
# 32 query heads: with 32 key/value heads (MHA) a step reads 4 GiB, with one (MQA) 128 MiB. That
# only holds where an implementation reads K and V as they are. `repeat_kv` asks for a copy for
# every query head first, and XLA writes it out where it finds no way around it: a cache of fewer
# heads may then cost more than a full one.

# %%
KV_HEADS = (2, 1) if TINY else (32, 8, 1)
step = dict(seq_len=1024 if TINY else 32768, heads=32, batch=8, direction="decode")
cases = [
    function_rows.Case(name, kv_heads=count, **step)
    for name in (("mosaic_tpu",) if TINY else ("repeat_kv", "mosaic_tpu"))
    for count in KV_HEADS
]
decoded = [] if "v5p" in missing else [function_rows.compiled(case, "v5p") for case in cases]
if decoded:
    figure = plot_curves(decoded, x="kv_heads", title="One token for each of 8 rows")
else:
    one = dict(model="llama-3-70b", where="v5p", heads_at_once=True, fused_qkv=False)
    figure = plot_curves(
        committed.path("layers.json"), x="kv_heads", table="optimisations", title="A layer", **one
    )

# %% [markdown]
# ## How many tokens fit
#
# A cache takes `bytes_per_token` for every token and layer: keys and values of K heads, and a
# float32 scale per vector where they are quantized. Take a model of Llama-3-8B's shape (32 layers,
# 8 key/value heads of 128, 8.03 billion parameters in bfloat16) and leave a tenth of the memory to
# everything else. Its cache then has room for this many tokens, all requests together; the last
# column is the same model with a key/value head for each of its 32 query heads.

# %%
LAYERS, PARAMETERS = 32, 8.03e9


def room(chip, kv_heads, dtype):
    left = 0.9 * chip.hbm_bytes - 2 * PARAMETERS
    tokens = left / (LAYERS * bytes_per_token(kv_heads, 128, dtype=dtype))
    return f"{tokens:,.0f}" if tokens > 0 else "the weights do not fit"


columns = [(8, "bfloat16"), (8, "int8"), (8, "int4"), (32, "bfloat16")]
Markdown(
    tables.plain(
        ["chip", *(f"K={kv_heads}, {dtype}" for kv_heads, dtype in columns)],
        [
            [chip.name, *(room(chip, *column) for column in columns)]
            for chip in aot.TARGETS.values()
            if chip.hbm_bytes
        ],
    )
)

# %% [markdown]
# That is arithmetic. The compiler agrees: of the decoding step above, all but a few hundred KiB is
# the cache.

# %%
for row in decoded:
    if row["implementation"] == "mosaic_tpu":
        tokens = row["batch"] * row["seq_len"]
        cache = tokens * bytes_per_token(row["kv_heads"], 128)
        planned = units.size(row["memory_bytes"])
        print(f"K={row['kv_heads']:<3} cache {units.size(cache):>10}, program {planned:>10}")

# %% [markdown]
# ## A whole layer
#
# Projections come on top, and they are the same for everyone. `benchmarks/layer_bench.py` compiles
# the layers of published models (its results are in `benchmarks/results/layers.md`); the same
# function compiles one here. `einsum` is the layer with repeated heads.

# %%
sizes = (128, 8, 2, 16, 256) if TINY else (2048, 16, 2, 128, 4096)
model = layer_cases.Model("a layer", *sizes, batch=1)
chip = "v5p"
names = ("mosaic_tpu",) if TINY else ("einsum", "mosaic_tpu")
for name in () if chip in missing else names:
    case = layer_cases.Case(model, "GroupedQueryAttention", name, "bfloat16")
    cell = layer_jobs.Compile(case, chip)()
    memory, bound = units.size(cell.memory_bytes), units.seconds(cell.roofline)
    print(f"{name:<10} on {chip}: {memory} of HBM, at least {bound} (roofline, not measured)")

# %% [markdown]
# ## Measured, on the device at hand
#
# The same rows, with a time in them: medians of calls in turn, so that a noisy machine is noisy to
# all. On a CPU the memory is the host's and is not called HBM. Sizes are small by default; on a GPU
# or TPU they are not.

# %%
on_cpu = here.platform == "cpu"
lengths = (64, 128) if TINY else (512, 1024, 2048) if on_cpu else (2048, 4096, 8192, 16384)
small = dict(heads=8, kv_heads=2, head_dim=64, dtype="float32" if on_cpu else "bfloat16")
measured = []
for length in lengths:
    names = ("repeat_kv", "xla", "xla_chunked", "default")
    group = [function_rows.Case(name, length, **small) for name in names]
    measured += function_rows.measured(group, seconds=0.05 if TINY else 0.3)
figure = plot_curves(measured, title=f"Measured on: {here.device_kind}")

# %% [markdown]
# The picture is that of the chips above: where the logits no longer fit the cache of the processor,
# writing them is what takes the time.
#
# ## Where to go on
#
# - The scripts behind this: `python benchmarks/mqa_bench.py --target=v5p,h200`,
#   `benchmarks/layer_bench.py`, `benchmarks/kv_cache_bench.py`.
# - What happens inside of the kernel: `inside_a_kernel.ipynb`.
# - More tokens than one chip has room for: `long_context.ipynb`.
