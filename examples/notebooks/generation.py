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
# # Generating text: caches, shared prefixes, speculative blocks
#
# A small trained decoder (`examples/decoder.py`) reads texts with facts in them, and is asked about
# one. With every kind of cache it must give the answer that it gives without one; what differs is
# how many bytes a token takes.

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
import random

import jax
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

import axattn
from axattn.plotting import plot_attention, sown_weights
from benchmarks.harness import environment
from benchmarks.harness.plotting import COLORS, RULES
from examples import checkpoint, data, quality
from examples.caches import KINDS, make_caches
from examples.generation import generate_without_cache, jit_generate
from examples.serving import Server
from examples.speculative import ngram_draft, speculate

environment.choose_backend()  # the CPU, where compilers for other chips are all that there is
# Below, texts are asserted to be the same. TPUs and GPUs would otherwise multiply float32 in fewer
# bits, and rounding would decide between tokens that are about as likely.
jax.config.update("jax_default_matmul_precision", "highest")
print(f"axattn {axattn.__version__}, jax {jax.__version__}, {jax.devices()[0].device_kind}")

# %%
QUESTIONS, LENGTH = (4, 160) if TINY else (24, 512)  # texts, and tokens of each
FACTS = 6 if TINY else 20  # of a text, about other names
DTYPES = ("int8",) if TINY else ("float32", "bfloat16", "int8", "float8_e4m3fn", "int4")
CHUNK = 32 if TINY else 128  # tokens of a prompt at a time

model = checkpoint.load()
print(model.config)

# %% [markdown]
# ## A needle
#
# A token is a word or a digit. The codes are drawn anew for each text, so an answer has to be read
# in it.

# %%
short = data.needle(random.Random(1), length=44, depth=0.3, other_facts=2)
print(data.decode(short.prompt), "->", data.decode(short.answer))

# %% [markdown]
# Which head reads it? Layers sow their attention weights on request. Taken is the head with the
# most weight on the four digits, of the queries that have to name them.


# %%
@nnx.jit
def weights_of(model, tokens):
    model(tokens, sow_weights=True)
    return nnx.pop(model, nnx.Intermediate)


text = np.concatenate([short.prompt, short.answer[: data.CODE_DIGITS - 1]])
weights = sown_weights(weights_of(model, text[None]))
queries = np.arange(len(short.prompt) - 1, len(text))
windows = np.lib.stride_tricks.sliding_window_view(short.prompt, data.CODE_DIGITS)
at = np.nonzero((windows == short.answer[:-1]).all(1))[0][0]
on_digits = {
    (layer, head): float(np.asarray(w)[0, head, queries, at + np.arange(data.CODE_DIGITS)].mean())
    for layer, w in weights.items()
    for head in range(model.config.heads)
}
layer, head = max(on_digits, key=on_digits.get)
print(f"{layer}, head {head}: {on_digits[layer, head]:.0%} of the weight is on the digit it names")

# %%
words = [data.VOCABULARY[token] for token in text]
near = np.arange(max(at - 12, 0), min(at + 12, len(text)))  # keys around the fact
figure = plot_attention(
    weights[layer][0, head][np.ix_(queries, near)],
    query_labels=[words[i] for i in queries],
    key_labels=[words[i] for i in near],
    title=f"{layer.removesuffix('/attention_weights')}, head {head}: where the next token is read",
)

# %% [markdown]
# ## The same tokens with every kind of cache
#
# Without a cache, all of the text goes through the model for each new token. A cache keeps keys and
# values, so that a step is one token. Three kinds:
#
# - dense: room for a fixed number of tokens per text;
# - ring: a layer that sees a window of tokens keeps no more than the window (here every other
#   layer, whose window is 7; the others stay dense);
# - paged: all texts share a pool of pages.
#
# In float32 each holds what was computed, and the text must be the same.

# %%
prompts, answers = data.needles(1, LENGTH, QUESTIONS, FACTS)
NEW = answers.shape[1]
without = np.asarray(generate_without_cache(model, prompts, max_new_tokens=NEW))
found = (without == answers).all(1).mean()
print(f"no cache: {found:.0%} of questions answered right")
for kind in KINDS:
    caches = make_caches(model.config, kind, QUESTIONS, LENGTH + NEW)
    size = sum(cache.nbytes for cache in caches)
    generated = jit_generate(
        model, caches, prompts, max_new_tokens=NEW, stop_token=data.STOP, chunk_size=CHUNK
    )
    assert (np.asarray(generated.tokens) == without).all()
    print(f"{kind:6} the same tokens; {size / 1e6:.1f} MB for {QUESTIONS} texts")

# %% [markdown]
# ## Fewer bits
#
# A cache's `dtype` says how keys and values are stored; int8, float8 and int4 have one scale per
# token and head beside them. What that costs: the divergence (KL, in nats per token) of what the
# model predicts from what it predicts without a cache, on texts of the same kind, and the share of
# needles that it still finds.


# %%
def size_of(kind, dtype, length):
    """Bytes of the caches of one text, of all layers; nothing is allocated."""
    caches = jax.eval_shape(lambda: make_caches(model.config, kind, 1, length, dtype=dtype))
    return sum(cache.nbytes for cache in caches)


tokens = data.documents(random.Random(2), 2, LENGTH)
truth = quality.logits_of(model, tokens)
print("dtype          bytes per token  divergence  answered")
for dtype in DTYPES:
    caches = make_caches(model.config, "dense", 2, LENGTH, dtype=dtype)
    per_token = sum(cache.bytes_per_token for cache in caches)
    logits = quality.logits_over(model, caches, tokens, chunk_size=CHUNK)
    divergence = quality.difference(truth, logits, tokens).divergence
    caches = make_caches(model.config, "dense", QUESTIONS, LENGTH + NEW, dtype=dtype)
    right = quality.answered_over(model, caches, prompts, answers, chunk_size=CHUNK)
    print(f"{dtype:13} {per_token:16} {divergence:11.1e} {right:9.0%}")
    assert right == found or dtype == "int4"

# %%
lengths = 2 ** np.arange(8, 17)
lines = [("dense", "float32"), ("ring", "float32"), ("dense", "int8"), ("ring", "int8")]
figure, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
for color, (kind, dtype) in zip(COLORS, lines, strict=False):
    sizes = [size_of(kind, dtype, int(length)) / 2**20 for length in lengths]
    ax.loglog(
        lengths, sizes, "-" if kind == "dense" else "--", color=color, label=f"{kind}, {dtype}"
    )
ax.set_xscale("log", base=2)
ax.set(xlabel="tokens of one text", ylabel="MiB, all layers", title="Bytes of the caches")
ax.grid(color=RULES)
ax.legend()
plt.show()

# %% [markdown]
# A ring is as long as the window, so half of this model's layers cost next to nothing. int8 takes a
# little more than a quarter of float32: a byte per number, and the scales. A paged cache takes per
# token what a dense one takes, but only for pages that hold something.
#
# ## Shared prefixes
#
# Three questions about one text. `Server` (`examples/serving.py`) is a loop over two things: a
# `PagePool` on the host, which knows the pages of each sequence and finds published prefixes by
# their token ids, and a `PagedCache` per layer on the device.

# %%
rng = random.Random(0)
codes = {name: data.new_code(rng) for name in rng.sample(data.NAMES, 3)}
sentences = [data.filler(rng) for _ in range(8)] + [data.fact(*item) for item in codes.items()]
rng.shuffle(sentences)
context = data.encode(" ".join(sentences))
asked = [context + data.encode(data.question(name)) for name in codes]
print(f"{len(context)} tokens of text, {len(asked[0]) - len(context)} of a question")

PAGE, WIDTH = 16, 12
server = Server(model, rows=3, num_pages=40, page_size=PAGE, pages_per_row=WIDTH)


def show(*sequences):
    now = server.pool.statistics()
    print(
        f"{server.tokens_read} tokens read, {now.tokens_stored} stored for {now.tokens_logical} "
        f"in texts; {now.pages_in_use} pages in use, {now.pages_cached} kept, {now.pages_free} free"
    )
    for sequence in sequences:
        pages = server.pool.block_table([sequence], WIDTH)[0]
        print(f"  sequence {sequence}: pages {pages[pages >= 0]}")


first = server.start(asked[:1])
show(*first)

# %% [markdown]
# The other two begin with tokens that are in the pool. Their first pages are those of the first
# text; only the tokens behind are read. A page in which texts part is copied.

# %%
sequences = first + server.start(asked[1:])
show(*sequences)

# %%
said = np.array([server.step(sequences) for _ in range(data.CODE_DIGITS)]).T
for name, row in zip(codes, said, strict=True):
    print(f"{data.question(name)} {data.decode(row)}")
    assert data.decode(row) == codes[name]

# %% [markdown]
# A fork shares everything, the last page too, and takes no page. When one of the two goes on, it
# gets a copy of that page (copy on write), and they part: here with the likeliest token and
# another one.

# %%
fork = server.fork(first[0])
show(first[0], fork)
server.step([first[0], fork], [server.newest[fork], data.encode("and")[0]])
show(first[0], fork)

# %% [markdown]
# Sequences that have ended leave their pages in the pool until they are needed for others. The same
# question once more costs one token: the last one, whose logits are the answer's beginning.

# %%
for sequence in [*sequences, fork]:
    server.pool.free(sequence)
read = server.tokens_read
again = server.start(asked[:1])
show(*again)
assert server.tokens_read == read + 1
assert data.decode([server.newest[again[0]]]) == codes[next(iter(codes))][0]

# %% [markdown]
# ## Speculative blocks
#
# A step reads all parameters, keys and values for one token; for a few tokens it reads them once,
# too. So something cheap drafts the next tokens, and one call with T = 1 + drafted tokens checks
# all of them. Those that the model would have taken itself stay, `cache.truncate` takes back the
# others, and the text is that of greedy decoding (`examples/speculative.py`).
#
# Here the draft is what followed the last time that the newest tokens stood in the text: it costs
# nothing, and it is good where texts repeat themselves, as those of this model do.

# %%
NEW = 16 if TINY else 64
text = data.documents(random.Random(3), 1, 64 if TINY else 256)
greedy = np.asarray(generate_without_cache(model, text, max_new_tokens=NEW))
print("...", data.decode(text[0, -12:]), "->", data.decode(greedy[0, :24]), "...")
print("drafted at a time  model calls  of drafts accepted")
print(f"{'none':>17} {NEW - 1:12}")
for size in (4,) if TINY else (2, 4, 8):
    caches = make_caches(model.config, "dense", 1, text.shape[1] + NEW + size)
    got = speculate(model, caches, text, draft=ngram_draft, draft_size=size, max_new_tokens=NEW)
    assert (got.tokens == greedy).all()
    assert got.calls < NEW - 1
    print(f"{size:17} {got.calls:12} {got.accepted / got.drafted:19.0%}")

# %% [markdown]
# Longer drafts save calls for as long as they are right. On an accelerator, where a step's time is
# that of reading memory, calls are what is paid for; on a CPU a block of five tokens takes longer
# than one token. Any other draft, a smaller model say, goes where `ngram_draft` stands.
