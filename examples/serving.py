"""Several texts over one pool of pages: what they have in common is read and stored once.

    server = Server(model, rows=4, num_pages=64, page_size=16, pages_per_row=16)
    a, b = server.start([prompt_a, prompt_b])  # reads what is not in the pool yet
    server.step([a, b])                        # one more token each
    c = server.fork(a)                         # shares all pages, until one of the two goes on

The host's side, `axattn.cache.PagePool`, knows which page has which tokens; the device's side is a
`PagedCache` per layer, whose table is made anew for each step.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from axattn.cache import PagedCache, PagePool, PoolExhaustedError
from examples.decoder import Decoder


class Server:
    """Continues texts greedily, a batch at a time.

    Args:
      model: is not changed.
      rows: of a batch, the most texts in one call.
      num_pages, page_size, pages_per_row: as `PagedCache.create` takes them.
      dtype: of the caches.

    Attributes:
      pool: the `PagePool`; its ``statistics()`` say what is shared.
      newest: by sequence, the token that the model takes to be next.
      tokens_read: how many tokens the model was run on, padding left out.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        rows: int,
        num_pages: int,
        page_size: int,
        pages_per_row: int,
        dtype: jax.typing.DTypeLike = jnp.float32,
    ):
        config = model.config
        self.pool = PagePool(num_pages, page_size)
        self.newest: dict[int, int] = {}
        self.tokens_read = 0
        self._model, self._rows, self._width = model, rows, pages_per_row
        sizes = rows, num_pages, page_size, pages_per_row, config.kv_heads, config.head_dim
        self._caches = tuple(PagedCache.create(*sizes, dtype=dtype) for _ in config.windows)

    def start(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """New sequences, one per prompt, whose next tokens are then in `newest`.

        What a prompt begins with is not read again where another text began with it.

        Raises:
          PoolExhaustedError: there are too few pages; nothing has changed then.
          ValueError: more prompts than ``rows``, one without tokens or longer than a row; likewise.
        """
        prompts = [list(map(int, prompt)) for prompt in prompts]
        self._check([len(prompt) for prompt in prompts])
        sequences: list[int] = []
        try:
            for prompt in prompts:
                sequences.append(self.pool.allocate(prompt))
        except PoolExhaustedError:
            for sequence in sequences:
                self.pool.free(sequence)
            raise
        starts = [self.pool.cached(sequence) for sequence in sequences]
        tails = [prompt[start:] for prompt, start in zip(prompts, starts, strict=True)]
        self._run(sequences, tails)
        return sequences

    def step(self, sequences: Sequence[int], tokens: Sequence[int] | None = None) -> list[int]:
        """Appends a token to each sequence, by default its `newest`, and returns these tokens.

        Raises:
          PoolExhaustedError: there are too few pages; no sequence has changed then.
          ValueError: more sequences than ``rows``, one of them twice, another number of tokens, or
            a row that is full; likewise.
        """
        sequences = list(sequences)
        if len(set(sequences)) < len(sequences):
            raise ValueError(f"sequences takes each once (fork one of them), got {sequences}")
        tokens = [self.newest[s] for s in sequences] if tokens is None else list(map(int, tokens))
        if len(tokens) != len(sequences):
            raise ValueError(f"tokens takes one for each of {len(sequences)}, got {len(tokens)}")
        before = self.pool.lengths(sequences).tolist()
        self._check([length + 1 for length in before])
        try:
            for sequence, token in zip(sequences, tokens, strict=True):
                self.pool.append(sequence, [token])
        except PoolExhaustedError:
            for sequence, length in zip(sequences, before, strict=True):
                self.pool.truncate(sequence, length)
            raise
        self._run(sequences, [[token] for token in tokens])
        return tokens

    def fork(self, sequence: int) -> int:
        """Another sequence with the same tokens, in the same pages."""
        fork = self.pool.fork(sequence)
        self.newest[fork] = self.newest[sequence]
        return fork

    def _check(self, lengths: Sequence[int]) -> None:
        """Whether texts of these lengths can be the rows of a call."""
        room = self._width * self.pool.page_size
        if not 1 <= len(lengths) <= self._rows:
            raise ValueError(f"a call takes 1 to {self._rows} rows, got {len(lengths)}")
        if not 1 <= min(lengths) <= max(lengths) <= room:
            raise ValueError(f"a row takes 1 to {room} tokens, got {list(lengths)}")

    def _run(self, sequences: Sequence[int], tokens: list[list[int]]) -> None:
        """The model on tokens that the pool has room for and the caches do not have."""
        empty = self._rows - len(sequences)
        counts = np.array([*map(len, tokens), *[0] * empty], np.int32)
        length = 1 << (int(counts.max()) - 1).bit_length()  # few shapes, few compilations
        padded = np.zeros((self._rows, length), np.int32)
        for row, row_tokens in enumerate(tokens):
            padded[row, : len(row_tokens)] = row_tokens
        sources, targets = self.pool.take_copies()
        # A row copies one page at most, but what was taken back may have left some.
        width = self._rows * max(1, -(-len(sources) // self._rows))
        copies = np.full((2, width), -1, np.int32)
        copies[0, : len(sources)], copies[1, : len(targets)] = sources, targets
        table = self.pool.block_table([*sequences, *[None] * empty], self._width)
        stored = np.array([*map(self.pool.cached, sequences), *[0] * empty], np.int32)
        chosen, self._caches = _step(
            self._model, self._caches, copies, table, stored, padded, counts
        )
        for sequence, token in zip(sequences, np.asarray(chosen).tolist(), strict=False):
            self.pool.publish(sequence)
            self.newest[sequence] = token
        self.tokens_read += int(counts.sum())


@nnx.jit(donate_argnames="caches")
def _step(model, caches, copies, table, stored, tokens, counts):
    """The likeliest token behind each row's last one, int32 [B], and the caches."""
    caches = tuple(cache.copy_pages(*copies).with_table(table, stored) for cache in caches)
    logits, caches = model(tokens, caches=caches, lengths=counts)
    last = jnp.maximum(counts - 1, 0)[:, None, None]
    logits = jnp.take_along_axis(logits, last, axis=1)[:, 0]
    return logits.argmax(-1).astype(jnp.int32), caches
