"""Speculative decoding: cheap guesses of the next tokens, all of them checked in one call.

    got = speculate(model, caches, prompts, draft=ngram_draft, draft_size=4, max_new_tokens=32)

On an accelerator a call of a model over a cache takes about as long for five tokens as for one: it
reads the same parameters, keys and values. So something cheap drafts a few tokens, the model reads
them together, and those that it would have taken itself stay; the cache is cut back behind them.
Whatever was drafted, the text is that of greedy decoding, but for rounding where two tokens are
about as likely (Leviathan et al. 2022, arXiv:2211.17192, of which this is the case of temperature
0).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from axattn._typing import Array, Int
from axattn.cache import Cache, prefill
from examples.generation import overflowed


class Speculated(NamedTuple):
    """What `speculate` returns.

    Attributes:
      tokens: int32 [B, max_new_tokens].
      calls: of the model, behind the prompts; greedy decoding makes max_new_tokens - 1.
      accepted: how many drafted tokens are in ``tokens``, of all rows.
      drafted: how many there were.
    """

    tokens: np.ndarray
    calls: int
    accepted: int
    drafted: int


def ngram_draft(text: Sequence[int], count: int, longest: int = 3) -> list[int]:
    """What followed the last time that the text's newest tokens stood in it.

    As many of its newest tokens as there is an earlier place for, at most ``longest``. Where none
    is found, or the text ends before ``count``, the newest token is repeated.
    """
    text = list(text)
    for size in range(min(longest, len(text) - 1), 0, -1):
        newest = text[-size:]
        for start in range(len(text) - size - 1, -1, -1):
            if text[start : start + size] == newest:
                found = text[start + size : start + size + count]
                return found + [text[-1]] * (count - len(found))
    return [text[-1]] * count


def speculate(
    model: Callable[..., tuple[Array, Any]],
    caches: Any,
    prompts: Int[Array, "B T"],
    *,
    draft: Callable[[Sequence[int], int], Sequence[int]],
    draft_size: int,
    max_new_tokens: int,
    chunk_size: int = 128,
) -> Speculated:
    """Continues each prompt greedily for ``max_new_tokens``, by checking drafts.

    Args:
      model: as `examples.generation.generate` takes it; an NNX module.
      caches: empty ones, with room for prompts, new tokens and ``draft_size`` more; rings with a
        ``max_append`` of at least ``draft_size``, which is how far they can go back. They are
        donated.
      prompts: tokens.
      draft: ``draft(text, draft_size)``: that many tokens that may follow. It sees one row's
        prompt and all of its new tokens.
      draft_size, max_new_tokens: at least 1.

    Raises:
      ValueError: sizes below 1; a draft of another size; caches without that room.
    """
    for name, value in (("draft_size", draft_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{name} takes at least 1, got {value}")
    texts = np.asarray(prompts).tolist()
    wanted = len(texts[0]) + max_new_tokens
    first, caches = _read(model, caches, jnp.asarray(prompts), chunk_size)
    _check_room(caches, len(texts))
    for text, token in zip(texts, np.asarray(first).tolist(), strict=True):
        text.append(token)
    calls = accepted = drafted = 0
    while any(len(text) < wanted for text in texts):
        goes_on = np.array([len(text) < wanted for text in texts])
        block = np.zeros((len(texts), 1 + draft_size), np.int32)
        for row in np.nonzero(goes_on)[0]:
            guesses = list(draft(texts[row], draft_size))
            if len(guesses) != draft_size:
                raise ValueError(f"draft takes {draft_size} tokens to say, said {len(guesses)}")
            block[row] = [texts[row][-1], *guesses]
        chosen, agreed, caches = _verify(model, caches, block, goes_on)
        _check_room(caches, len(texts))
        for row in np.nonzero(goes_on)[0]:
            accepted += min(int(agreed[row]), wanted - len(texts[row]))
            texts[row] += np.asarray(chosen)[row, : int(agreed[row]) + 1].tolist()
        calls += 1
        drafted += draft_size * int(goes_on.sum())
    tokens = np.array([text[:wanted] for text in texts], np.int32)[:, -max_new_tokens:]
    return Speculated(tokens, calls, accepted, drafted)


def _check_room(caches: Any, batch: int) -> None:
    full = np.nonzero(np.asarray(overflowed(caches, batch)))[0]
    if full.size:
        raise ValueError(
            "caches takes room for prompts, new tokens and draft_size more, and rings with "
            f"max_append >= draft_size; rows {full.tolist()} overflowed"
        )


@nnx.jit(static_argnames="chunk_size", donate_argnames="caches")
def _read(model, caches, prompts, chunk_size):
    """The token after each prompt, int32 [B], and caches with the prompts in them."""

    def step(caches, tokens, lengths):
        return model(tokens, caches=caches, lengths=lengths)

    logits, caches = prefill(step, caches, prompts, chunk_size=chunk_size)
    return logits.argmax(-1).astype(jnp.int32), caches


@nnx.jit(donate_argnames="caches")
def _verify(model, caches, block, goes_on):
    """Of blocks [B, 1 + D] of newest tokens and drafts: the model's own tokens behind each, how
    many drafts are like them from the first on, and caches without the others."""
    lengths = jnp.where(goes_on, block.shape[1], 0)
    logits, caches = model(block, caches=caches, lengths=lengths)
    chosen = logits.argmax(-1).astype(jnp.int32)
    agreed = jnp.cumprod(block[:, 1:] == chosen[:, :-1], axis=1).sum(1)
    # The newest token and the drafts that are right stay; a row that had no tokens is as it was.
    kept = jnp.where(goes_on, 1 + agreed, 0)

    def cut(cache: Cache) -> Cache:
        return cache.truncate(cache.lengths - lengths + kept)

    caches = jax.tree.map(cut, caches, is_leaf=lambda x: isinstance(x, Cache))
    return chosen, agreed, caches
