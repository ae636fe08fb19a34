"""How much of the memory that requests reserve they use: a made-up day of a server.

Requests of mixed lengths arrive, are processed one token per step, and leave. No array is made:
a dense cache's reservations are arithmetic, a paged one's are `axattn.cache.PagePool`'s.
"""

from __future__ import annotations

import dataclasses
from collections import deque

import numpy as np

from axattn.cache._pool import PagePool

_SAMPLE_EVERY = 8  # steps


@dataclasses.dataclass(frozen=True)
class Request:
    """Tokens of its prompt, and those that are generated; the step that it arrives at."""

    arrival: int
    prompt: int
    generated: int


@dataclasses.dataclass(frozen=True)
class Occupancy:
    """What one kind of cache reserved for the requests that were live, over all steps.

    Attributes:
      kind: ``"dense"`` or ``"paged"``.
      page_size: None where dense.
      slots_per_token: slots reserved / tokens stored, both added up over time.
      peak_tokens: most tokens stored at a time.
      peak_slots, peak_bytes: what is reserved at that time.
      of_dense: peak_slots / those of the dense cache.
    """

    kind: str
    page_size: int | None
    slots_per_token: float
    peak_tokens: int
    peak_slots: int
    peak_bytes: int
    of_dense: float

    @property
    def unused(self) -> float:
        """Part of the reserved slots that no token is in."""
        return 1 - 1 / self.slots_per_token


def make_trace(requests: int, rows: int, max_length: int, seed: int = 0) -> list[Request]:
    """Prompts log-normal around an eighth of ``max_length``, answers geometric around a sixteenth.

    They arrive, at random, about as fast as ``rows`` of them at a time are done.

    Raises:
      ValueError: ``max_length`` has no room for a prompt and an answer.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}")
    rng = np.random.default_rng(seed)
    answer = max(1, max_length // 16)
    prompts = rng.lognormal(np.log(max(1, max_length // 8)), 1.0, requests).astype(int)
    prompts = np.clip(prompts, 1, max(1, 3 * max_length // 4))
    answers = np.minimum(rng.geometric(1 / answer, requests), max_length - prompts)
    arrivals = np.cumsum(rng.exponential(answer / rows, requests)).astype(int)
    columns = (map(int, column) for column in (arrivals, prompts, answers))
    return [Request(*values) for values in zip(*columns, strict=True)]


class _Live:
    """A request at work: tokens so far, tokens to come, its sequence in each pool."""

    def __init__(self, request: Request, pools: list[PagePool]):
        self.length, self.left = request.prompt, request.generated
        self.sequences = [pool.allocate(request.prompt) for pool in pools]


def replay(
    trace: list[Request],
    *,
    rows: int,
    max_length: int,
    page_sizes: tuple[int, ...],
    slot_bytes: int,
) -> list[Occupancy]:
    """Runs a trace through a dense cache and through a pool of each page size.

    Args:
      trace: in order of arrival; a request longer than ``max_length`` is an error of the caller's.
      rows: most requests at a time; the others wait.
      max_length: what a dense cache reserves for each.
      slot_bytes: bytes of a token in all layers.

    Returns:
      The dense one first.

    Raises:
      RuntimeError: a pool and the requests disagree about the tokens that there are.
    """
    pools = [PagePool(rows * -(-max_length // size), size) for size in page_sizes]
    waiting, live = deque(trace), []
    used: list[tuple[int, list[int]]] = []  # tokens, slots of each kind of cache
    step = 0
    while waiting or live:
        if not live and waiting[0].arrival > step:
            step = waiting[0].arrival  # nothing happens until then
        while waiting and len(live) < rows and waiting[0].arrival <= step:
            live.append(_Live(waiting.popleft(), pools))
        for request in live:
            request.length, request.left = request.length + 1, request.left - 1
            for pool, sequence in zip(pools, request.sequences, strict=True):
                pool.append(sequence, 1)
        if step % _SAMPLE_EVERY == 0 or not used:
            tokens = sum(request.length for request in live)
            used.append((tokens, [len(live) * max_length, *_slots(pools, tokens)]))
        for request in live:
            if request.left == 0:
                for pool, sequence in zip(pools, request.sequences, strict=True):
                    pool.free(sequence)
        live = [request for request in live if request.left]
        step += 1
    _slots(pools, 0)
    kinds = [("dense", None), *(("paged", size) for size in page_sizes)]
    all_tokens = sum(tokens for tokens, _ in used)
    peak_tokens, peak = max(used)
    return [
        Occupancy(
            *kind,
            slots_per_token=sum(slots[i] for _, slots in used) / all_tokens,
            peak_tokens=peak_tokens,
            peak_slots=peak[i],
            peak_bytes=peak[i] * slot_bytes,
            of_dense=peak[i] / peak[0],
        )
        for i, kind in enumerate(kinds)
    ]


def _slots(pools: list[PagePool], tokens: int) -> list[int]:
    """Slots in use in each pool, which must have stored so many tokens, and none for no token."""
    found = []
    for pool in pools:
        now = pool.statistics()
        slots = now.pages_in_use * now.page_size
        if now.tokens_stored != tokens or slots < tokens or (slots and not tokens):
            raise RuntimeError(f"{pool!r} has {now}, and the requests have {tokens} tokens")
        found.append(slots)
    return found
