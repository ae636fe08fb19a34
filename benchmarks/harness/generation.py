"""Generating text with a decoder: one model and cache, in a process of its own."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

from benchmarks.harness import environment

KINDS = ("none", "dense", "ring", "paged")
# A step without a cache takes as long for the first token as for the last one.
_TOKENS_WITHOUT_CACHE = 32


@dataclasses.dataclass(frozen=True)
class Model:
    """Sizes of the decoder in ``examples/decoder.py``, its weights random and float32.

    Attributes:
      hidden: features of the residual stream; four times as many in the MLPs.
      layers, heads, kv_heads: of attention; heads are ``hidden // heads`` wide.
      vocabulary: number of tokens.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(
                    f"{field.name} must be at least 1, got {getattr(self, field.name)}"
                )
        if self.hidden % (2 * self.heads):
            # Halves of a head, for RoPE and int4.
            raise ValueError(f"hidden must be a multiple of 2 * heads, got {self.hidden}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads, {self.heads}, got {self.kv_heads}")

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


@dataclasses.dataclass(frozen=True)
class Generate:
    """A row: greedy generation, a token at a time.

    Attributes:
      kind: ``"dense"``, ``"ring"``, ``"paged"``, or ``"none"``: all of the text so far through
        the model for each token, in a buffer of one length.
      dtype: of the cache; float32 without one.
      batch, prompt, generated: rows; tokens of each prompt; tokens generated, of which the first
        one is the prompt's.
      repetitions: how often all of it is done, after a first time that does not count.
      window: of a ring, tokens to the left; the model's layers see no more then.
      page_size: tokens per page.
    """

    model: Model
    kind: str
    dtype: str
    batch: int
    prompt: int
    generated: int
    repetitions: int
    window: int
    page_size: int

    @property
    def name(self) -> str:
        return f"K={self.model.kv_heads} {self.kind} {self.dtype}"

    def __call__(self) -> Result:
        environment.choose_backend()
        return _generate(self)


@dataclasses.dataclass(frozen=True)
class Result:
    """Seconds of each prompt and of each token after the first; of compiling both programs.

    ``cache_bytes`` are those of all layers: keys, values and scales.
    """

    prompts: tuple[float, ...]
    tokens: tuple[float, ...]
    compile_seconds: float
    cache_bytes: int | None


def _generate(job: Generate) -> Result:
    import jax
    import numpy as np

    state, apply = _model(job)
    run = _without_cache if job.kind == "none" else _with_cache
    shape = (job.batch, job.prompt)
    prompt = np.random.default_rng(1).integers(0, job.model.vocabulary, shape).astype(np.int32)
    process, step, fresh, compile_seconds, cache_bytes = run(job, state, apply, prompt)

    count = job.generated - 1
    if job.kind == "none":
        count = min(count, _TOKENS_WITHOUT_CACHE)
    prompts: list[float] = []
    tokens: list[float] = []
    for repetition in range(job.repetitions + 1):
        carry = jax.block_until_ready(fresh())
        seconds, carry = _timed(process, carry)
        prompts.append(seconds)
        if repetition == 0:  # first touch of memory
            prompts.clear()
            for _ in range(min(count, 2)):
                carry = step(carry)
            jax.block_until_ready(carry)
            continue
        for _ in range(count):
            seconds, carry = _timed(step, carry)
            tokens.append(seconds)
    return Result(tuple(prompts), tuple(tokens), compile_seconds, cache_bytes)


def _timed(fn: Callable[[Any], Any], carry: Any) -> tuple[float, Any]:
    import jax

    start = time.perf_counter()
    carry = jax.block_until_ready(fn(carry))
    return time.perf_counter() - start, carry


def _model(job: Generate):
    """Random parameters, and ``apply(state, tokens, caches=None)``."""
    from flax import nnx

    from benchmarks.harness import inputs
    from examples.decoder import Config, Decoder

    m = job.model
    window = job.window if job.kind == "ring" else None
    config = Config(
        vocabulary=m.vocabulary,
        features=m.hidden,
        heads=m.heads,
        kv_heads=m.kv_heads,
        head_dim=m.head_dim,
        windows=(window,) * m.layers,
        hidden=4 * m.hidden,
    )
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    nnx.replace_by_pure_dict(state, inputs.random_like(nnx.to_pure_dict(state)))

    def apply(state, tokens, caches=None):
        return nnx.merge(graph, state)(tokens, caches=caches)

    return state, apply


def _with_cache(job: Generate, state, apply, prompt):
    """The carry is (the newest token [B, 1], caches)."""
    import jax
    import jax.numpy as jnp

    def step(state, caches, tokens):
        logits, caches = apply(state, tokens, caches)
        return jnp.argmax(logits[:, -1:], -1).astype(jnp.int32), caches

    def compiled(tokens):
        shapes = jax.eval_shape(fresh)
        return jax.jit(step, donate_argnums=1).lower(state, shapes, tokens).compile()

    fresh = functools.partial(_caches, job)
    start = time.perf_counter()
    on_prompt = compiled(prompt)
    on_token = compiled(jax.ShapeDtypeStruct((job.batch, 1), jnp.int32))
    seconds = time.perf_counter() - start
    size = sum(cache.nbytes for cache in jax.eval_shape(fresh))
    return (
        lambda carry: on_prompt(state, carry, prompt),
        lambda carry: on_token(state, carry[1], carry[0]),
        fresh,
        seconds,
        size,
    )


def _caches(job: Generate) -> tuple:
    import jax.numpy as jnp

    from axattn.cache import DenseCache, PagedCache, RingCache

    length, pages = job.prompt + job.generated, -(-(job.prompt + job.generated) // job.page_size)
    shape = (job.model.kv_heads, job.model.head_dim)

    def create():
        if job.kind == "dense":
            return DenseCache.create(job.batch, length, *shape, dtype=job.dtype)
        if job.kind == "ring":
            # A prompt goes in pieces as long as the window.
            return RingCache.create(
                job.batch, job.window, *shape, max_append=job.window, dtype=job.dtype
            )
        table = jnp.arange(job.batch * pages, dtype=jnp.int32).reshape(job.batch, pages)
        return PagedCache.create(
            job.batch, job.batch * pages, job.page_size, pages, *shape, dtype=job.dtype
        ).with_table(table)

    return tuple(create() for _ in range(job.model.layers))


def _without_cache(job: Generate, state, apply, prompt):
    """The carry is (texts [B, prompt + generated], how long they are)."""
    import jax
    import jax.numpy as jnp

    def step(state, texts, length):
        logits = apply(state, texts)  # what comes after the text is not seen: causal
        newest = jax.lax.dynamic_slice_in_dim(logits, length - 1, 1, 1)
        tokens = jnp.argmax(newest, -1).astype(jnp.int32)
        return jax.lax.dynamic_update_slice_in_dim(texts, tokens, length, 1), length + 1

    def fresh():
        room = ((0, 0), (0, job.generated))
        return jnp.pad(jnp.asarray(prompt), room), jnp.asarray(job.prompt, jnp.int32)

    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=1).lower(state, *jax.eval_shape(fresh)).compile()
    seconds = time.perf_counter() - start

    def run(carry):
        return compiled(state, *carry)

    return run, run, fresh, seconds, None
