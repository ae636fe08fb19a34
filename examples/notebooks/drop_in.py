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
# # Replace one import
#
# A model that uses Flax's multi-head attention, trained a little; the import swapped, and its
# checkpoint loaded; then converted to fewer key/value heads, and trained a little more. At the end
# a table: loss, bytes of the cache, and time.
#
# Everything runs on the device that is here: a CPU, a GPU or a TPU.

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
import pathlib
import random
import tempfile
from collections.abc import Callable

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import axattn
from axattn import checkpoints
from axattn.cache import DenseCache, bytes_per_token
from benchmarks.harness import environment, paired
from benchmarks.harness.plotting import COLORS, GREY, RULES, TEXT
from examples import data

environment.choose_backend()  # the CPU, where compilers for other chips are all that there is
print(f"axattn {axattn.__version__}, jax {jax.__version__}, {jax.devices()[0].device_kind}")

# %%
# Plain CPUs are slow in bfloat16; TPUs and GPUs are made for it.
DTYPE = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
HEADS, LAYERS, FEATURES = 8, 2, 64 if TINY else 128
BATCH, LENGTH = (4, 64) if TINY else (8, 128)
TRAINING, UPTRAINING = (30, 8) if TINY else (250, 50)
LONGER = 256 if TINY else 1024  # tokens of the texts that are timed
SECONDS = 0.2 if TINY else 3.0  # that timing takes

# %% [markdown]
# ## A model on Flax's layer
#
# A small causal decoder. It knows nothing of axattn: which attention layer it is built from is a
# field, and so is what makes its mask.


# %%
class Block(nn.Module):
    attention: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x, mask):
        y = nn.RMSNorm(dtype=DTYPE)(x)
        x = x + self.attention(num_heads=HEADS, dtype=DTYPE, name="attention")(y, mask=mask)
        y = nn.Dense(4 * FEATURES, dtype=DTYPE)(nn.RMSNorm(dtype=DTYPE)(x))
        return x + nn.Dense(FEATURES, dtype=DTYPE)(nn.gelu(y))


class Decoder(nn.Module):
    attention: Callable[..., nn.Module]
    make_mask: Callable = nn.make_causal_mask

    @nn.compact
    def __call__(self, tokens):  # int [B, T] -> float32 [B, T, V]
        embedding = nn.Embed(len(data.VOCABULARY), FEATURES, dtype=DTYPE)
        positions = self.param("positions", nn.initializers.normal(0.02), (LONGER, FEATURES))
        x = embedding(tokens) + positions[: tokens.shape[1]].astype(DTYPE)
        for i in range(LAYERS):
            x = Block(self.attention, name=f"block_{i}")(x, self.make_mask(tokens))
        return embedding.attend(nn.RMSNorm(dtype=DTYPE)(x)).astype(jnp.float32)


# %%
from flax import linen as attention  # the line that will change

model = Decoder(attention.MultiHeadDotProductAttention)

# %% [markdown]
# Its texts are made up (`examples/data.py`): sentences, facts, and questions about the facts. The
# training loop is optax as everywhere.

# %%
print(data.decode(data.document(random.Random(1), 32)))


def texts(seed, count):
    """int32 [count, B, T + 1]."""
    rng = random.Random(seed)
    return np.stack([data.documents(rng, BATCH, LENGTH + 1) for _ in range(count)])


def loss_of(model, params, tokens):
    logits = model.apply(params, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


unseen_loss = jax.jit(loss_of, static_argnums=0)


def train(model, params, texts, rate):
    """Parameters after one update per batch of texts, and the loss of each."""
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0, rate, 5, len(texts), rate / 20))

    @jax.jit
    def update(params, state, tokens):
        loss, gradients = jax.value_and_grad(loss_of, 1)(model, params, tokens)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = optimizer.init(params), []
    for tokens in texts:
        params, state, loss = update(params, state, tokens)
        losses.append(loss)
    return params, np.array(losses)


# %%
unseen = texts(seed=9, count=1)[0]
params = jax.jit(model.init)(jax.random.key(0), unseen[:, :-1])
params, training_losses = train(model, params, texts(seed=0, count=TRAINING), rate=3e-3)
print(f"loss of unseen texts: {unseen_loss(model, params, unseen):.3f} nats per token")

# %% [markdown]
# And a checkpoint, as Flax writes it.

# %%
folder = tempfile.TemporaryDirectory()
checkpoint = pathlib.Path(folder.name, "params.msgpack")
checkpoint.write_bytes(flax.serialization.to_bytes(params))
print(f"{checkpoint.stat().st_size / 1e6:.1f} MB")

# %% [markdown]
# ## The swap
#
# One import. The class has Flax's name, fields, parameters and initializers, so the checkpoint
# loads as it is, and the outputs are the same but for rounding.

# %%
from axattn import linen as attention  # was: from flax import linen as attention

swapped = Decoder(attention.MultiHeadDotProductAttention)
fresh = jax.eval_shape(swapped.init, jax.random.key(1), unseen[:, :-1])
loaded = flax.serialization.from_bytes(fresh, checkpoint.read_bytes())

theirs = jax.jit(model.apply)(params, unseen)
ours = jax.jit(swapped.apply)(loaded, unseen)
difference = float(jnp.abs(ours - theirs).max())
print(f"largest difference {difference:.1e}, of logits up to {float(jnp.abs(theirs).max()):.1f}")
# TPUs multiply float32 in bfloat16 unless told otherwise; bfloat16 has 8 bits.
tolerance = 1e-4 if jax.default_backend() == "cpu" else 0.05
assert difference < tolerance * float(jnp.abs(theirs).max())

# %% [markdown]
# Nothing else has to change. One thing may: Flax's mask is an array of T x T booleans, which has to
# be read to know what it hides. `axattn.Mask` says the same as data, a few numbers at most, and
# stays that small however long the text is.

# %%
structured = Decoder(
    attention.MultiHeadDotProductAttention, make_mask=lambda tokens: axattn.Mask.causal()
)
difference = jnp.abs(jax.jit(structured.apply)(loaded, unseen) - theirs).max()
assert difference < tolerance * jnp.abs(theirs).max()

# %% [markdown]
# How long does it take, forward and backward, on longer texts? The three run in turn, round after
# round, so that what else this machine does hits all alike; the figure is the median round, and the
# ratio is the median of the rounds' ratios. It is a figure of this device and of these sizes, and
# holds for no other. On a shared or busy machine, believe the first digit.

# %%
longer = data.documents(random.Random(2), 1, LONGER)


def timed(model):
    step = jax.jit(lambda params: jax.grad(loss_of, 1)(model, params, longer))
    return lambda: step(params)


names = {"flax": model, "axattn": swapped, "axattn, Mask.causal()": structured}
times = paired.compare({name: timed(model) for name, model in names.items()}, seconds=SECONDS)
for name in names:
    print(
        f"{name:22} {1e3 * times.median(name):7.1f} ms, "
        f"{times.ratio('flax', name):.2f} times as fast as flax"
    )

# %% [markdown]
# ### The same in NNX

# %%
from flax import nnx

import axattn.nnx

theirs = nnx.MultiHeadAttention(HEADS, FEATURES, decode=False, rngs=nnx.Rngs(0))
ours = axattn.nnx.MultiHeadAttention(HEADS, FEATURES, decode=False, rngs=nnx.Rngs(1))
nnx.update(ours, nnx.state(theirs, nnx.Param))
x = jax.random.normal(jax.random.key(0), (2, 32, FEATURES))
difference = jnp.abs(ours(x, is_causal=True) - theirs(x, mask=nnx.make_causal_mask(x[..., 0])))
print(f"largest difference {float(difference.max()):.1e}")
assert difference.max() < tolerance

# %% [markdown]
# ## Fewer key/value heads
#
# While a model generates, every token reads the keys and values of all tokens before it, and that
# is what the time goes into. Grouped-query attention (GQA, [Ainslie et al.
# 2023](https://arxiv.org/abs/2305.13245)) keeps the query heads and has fewer key/value heads;
# multi-query attention (MQA) has one. A trained model need not be trained anew: each new head
# starts as the mean of those that it replaces (`checkpoints.mha_to_gqa`), and some more training
# mends the rest.

# %%
import functools

KV_HEADS = {"MHA": HEADS, "GQA": 2, "MQA": 1}


def with_kv_heads(kv_heads):
    layer = functools.partial(attention.GroupedQueryAttention, num_kv_heads=kv_heads)
    return Decoder(layer, make_mask=structured.make_mask)


converted = {name: checkpoints.mha_to_gqa(loaded, n) for name, n in KV_HEADS.items()}
before = {
    name: float(unseen_loss(with_kv_heads(n), converted[name], unseen))
    for name, n in KV_HEADS.items()
}
for name in KV_HEADS:
    kernel = converted[name]["params"]["block_0"]["attention"]["key"]["kernel"]
    print(f"{name}: key kernel {kernel.shape}, loss right after conversion {before[name]:.3f}")

# %% [markdown]
# The mean of heads that were trained apart is a poor head, and the loss says so. Now some more
# training of all three: also of the unchanged model, since comparing with a model that was trained
# for less time would flatter the new ones.

# %%
more, uptrained, uptraining_losses = texts(seed=5, count=UPTRAINING), {}, {}
for name, n in KV_HEADS.items():
    uptrained[name], uptraining_losses[name] = train(
        with_kv_heads(n), converted[name], more, rate=1e-3
    )
after = {
    name: float(unseen_loss(with_kv_heads(n), uptrained[name], unseen))
    for name, n in KV_HEADS.items()
}

# %%
figure, ax = plt.subplots(figsize=(8, 3.5), layout="constrained")
ax.plot(training_losses, color=GREY, label="MHA, from scratch")
for color, (name, losses) in zip(COLORS, uptraining_losses.items(), strict=False):
    updates = np.arange(TRAINING, TRAINING + UPTRAINING)
    ax.plot(updates, losses, color=color, label=f"{name}, {KV_HEADS[name]} key/value heads")
ax.axvline(TRAINING, color=TEXT, linestyle=":", linewidth=1)
ax.set(xlabel="update", ylabel="loss, nats per token", title="Conversion, and training after it")
ax.grid(color=RULES)
ax.legend()
plt.show()

# %% [markdown]
# ## What it buys
#
# Bytes of a cache are arithmetic. The time is that of one query per text over `CACHED` tokens in a
# cache: the part of a decoding step that grows with the text, and that the number of key/value
# heads is about. It is measured with heads of 64, as models have them; this one's, of 16, are toys.

# %%
TEXTS, CACHED = (2, 512) if TINY else (8, 8192)


def over_cache(kv_heads, head_dim=64):
    """A function that attends over a full cache."""
    cache = DenseCache.create(TEXTS, CACHED, kv_heads, head_dim, dtype=DTYPE)
    tokens = jax.random.normal(jax.random.key(0), (TEXTS, CACHED, kv_heads, head_dim), DTYPE)
    cache = jax.jit(lambda cache, x: cache.append(x, x), donate_argnums=0)(cache, tokens)
    query = jax.random.normal(jax.random.key(1), (TEXTS, 1, HEADS, head_dim), DTYPE)
    step = jax.jit(lambda cache: cache.attend(query))
    return lambda: step(cache)


steps = {name: over_cache(n) for name, n in KV_HEADS.items()}
decoding = paired.compare(steps, seconds=SECONDS)
print(f"{'':5}{'loss after':>12}{'loss after':>12}{'cache bytes':>13}{'one query over':>16}")
print(f"{'':5}{'conversion':>12}{'training':>12}{'per token':>13}{f'{CACHED} tokens':>16}")
for name, n in KV_HEADS.items():
    per_token = LAYERS * bytes_per_token(n, FEATURES // HEADS, dtype=DTYPE)
    print(
        f"{name:5}{before[name]:12.3f}{after[name]:12.3f}{per_token:13}"
        f"{1e3 * decoding.median(name):13.2f} ms"
    )

# %% [markdown]
# Bytes fall with the heads, whatever the model. The loss that is left after so little training says
# nothing of a large model: there 5 % of the original steps were enough (Ainslie et al., figure 5).
#
# ## Which kernels ran?
#
# The layers took the fastest implementation that takes the call on this device. Which one that is,
# and why not another, is a question that can be asked, with shapes only:

# %%
for length in (LENGTH, 4096):
    q = jax.ShapeDtypeStruct((1, length, 16, 128), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((1, length, 2, 128), jnp.bfloat16)
    print(f"{length} tokens:")
    print(axattn.explain_implementations(q, kv, kv, is_causal=True), end="\n\n")

# %% [markdown]
# On a Hopper GPU or a TPU, flash attention kernels are taken with nothing said; `implementation=`
# of the layer names one, and then it is that one or an error. Next: what each of them costs on
# chips that are not here ([what_does_it_cost](what_does_it_cost.ipynb)), and text over caches
# ([generation](generation.ipynb)).
