"""Masks as pictures: which blocks are empty, full or partial, and what is inside."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from axattn._mask_parts import EMPTY, FULL, PARTIAL
from axattn._masks import Mask, check_positions, compute_mask_tile, normalize_mask, take_mask_row
from axattn.plotting import _axes, _style
from axattn.plotting._library import import_pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The most cells of a picture along one side: about as many pixels as a notebook has for it.
_CELLS = 512
# The most slots that are looked at along one side, and pairs of them at once.
_SAMPLES = 8192
_PAIRS = 1 << 22
# The most blocks along one side: of more nothing could be seen.
_MOST_BLOCKS = 4096
# More lines between blocks or elements would hide them.
_MOST_LINES = 40


def plot_mask(
    mask: Mask | jax.Array,
    q_len: int,
    kv_len: int,
    *,
    block_q: int | None = None,
    block_kv: int | None = None,
    q_positions: jax.Array | None = None,
    kv_positions: jax.Array | None = None,
    row: int = 0,
    head: int = 0,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw what each query may attend to, and the blocks that an implementation works in.

    Query slots go down, key slots to the right. Without block sizes every element is drawn. With
    them a block has the colour of its state in `axattn.Mask.block_map`, and elements can be seen
    inside of partial blocks only; the legend counts the blocks. Implementations skip empty blocks
    and ask nothing of the mask in full ones.

    A picture has at most about 512 cells along a side. Where there are more slots, a cell stands
    for several, and its colour is mixed by the share of them that may be attended to; beyond 8192
    slots it is the share of a regular sample of them. With blocks, cells are cut such that no
    cell lies in two blocks. Lengths of a million take seconds, as lengths of a thousand do; nothing
    of size T x S is made.

    Args:
      mask: the mask, or a bool array that broadcasts to ``[..., N, T, S]`` (True = attend).
      q_len: number of query slots, T.
      kv_len: number of key slots, S.
      block_q, block_kv: sizes of blocks in slots; both or neither.
      q_positions: int ``[T]`` or ``[B, T]``, positions of the queries; by default 0, 1, 2...
      kv_positions: int ``[S]`` or ``[B, S]``, likewise of the keys.
      row: the batch row to draw, where the mask differs between rows.
      head: the query head whose elements to draw, where a dense mask differs between heads. The
        states of blocks are those of all heads together.
      title: by default the names of the parts of the mask.
      ax: where to draw; by default in a new figure.

    Returns:
      The axes, in units of slots.

    Raises:
      TypeError: ``mask`` is neither a mask nor boolean.
      ValueError: a length or block size below 1, one block size without the other, more than 4096
        blocks along a side, a row or head that the mask does not have, or positions or an array
        in the mask that do not fit the lengths.
      ImportError: matplotlib is not installed.

    Example:
      >>> from axattn import Mask, plotting
      >>> mask = Mask.causal() & Mask.window(100, 0)
      >>> ax = plotting.plot_mask(mask, 512, 512, block_q=64, block_kv=64)
      >>> [text.get_text() for text in ax.get_legend().get_texts()]
      ['full: 0', 'partial: 21 (dark: attended)', 'empty: 43']
    """
    mask = mask if isinstance(mask, Mask) else Mask.dense(mask)
    blocks = _check_blocks(block_q, block_kv)
    for name, value in (("q_len", q_len), ("kv_len", kv_len)):
        _check_positive(name, value)
    q_positions = check_positions("q_positions", q_positions, q_len)
    kv_positions = check_positions("kv_positions", kv_positions, kv_len)
    _check_choice(mask, q_positions, kv_positions, row, head)
    kinds = [type(part).__name__.lower() for part in mask.parts]
    title = (" & ".join(kinds) or "everything") if title is None else title
    if blocks is not None:
        _check_block_count(q_len, kv_len, *blocks)
    mask = take_mask_row(normalize_mask(mask, None, q_len, kv_len), row)
    q_positions, kv_positions = _select_row(q_positions, row), _select_row(kv_positions, row)
    cells = [
        _choose_cell_size(length, block)
        for length, block in zip((q_len, kv_len), blocks or (None, None), strict=True)
    ]
    queries = _SlotSample.create(q_len, cells[0], q_positions)
    keys = _SlotSample.create(kv_len, cells[1], kv_positions)
    shares = _compute_shares(mask, queries, keys, head)
    if blocks is None:
        pixels, handles = _color_elements(shares)
    else:
        states = np.asarray(
            mask.block_map(
                q_len, kv_len, *blocks, q_positions=q_positions, kv_positions=kv_positions
            )
        )[0]
        pixels, handles = _color_blocks(shares, states, cells, blocks)

    if ax is None:
        _, ax = import_pyplot().subplots(figsize=(6.4, 6.0), layout="constrained")
    down, across = pixels.shape[0] * cells[0], pixels.shape[1] * cells[1]
    ax.imshow(pixels, extent=(-0.5, across - 0.5, down - 0.5, -0.5), aspect="auto")
    ax.set(xlim=(-0.5, kv_len - 0.5), ylim=(q_len - 0.5, -0.5), xlabel="key", ylabel="query")
    # A picture of few queries and many keys would be a hairline.
    ax.set_aspect("equal" if 0.25 <= q_len / kv_len <= 4 else "auto")
    _draw_lines(ax, (q_len, kv_len), blocks or (1, 1), "white" if blocks is None else "#999999")
    _axes.set_slot_ticks(ax, q_len, kv_len)
    ax.set_title(title, fontsize=10)
    _axes.add_axes_legend(
        ax, {name: _axes.make_patches(colors) for name, colors in handles.items()}
    )
    return ax


def _check_positive(name: str, value: Any) -> None:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} takes an int >= 1, got {value!r}")


def _check_blocks(block_q: int | None, block_kv: int | None) -> tuple[int, int] | None:
    if (block_q is None) != (block_kv is None):
        raise ValueError(
            f"block_q and block_kv go together, got block_q={block_q}, block_kv={block_kv}"
        )
    if block_q is None or block_kv is None:
        return None
    _check_positive("block_q", block_q)
    _check_positive("block_kv", block_kv)
    return block_q, block_kv


def _check_block_count(q_len: int, kv_len: int, block_q: int, block_kv: int) -> None:
    for name, length, block in (("block_q", q_len, block_q), ("block_kv", kv_len, block_kv)):
        if -(-length // block) > _MOST_BLOCKS:
            raise ValueError(
                f"{name} takes a size that makes at most {_MOST_BLOCKS} blocks of {length} slots, "
                f"got {block}"
            )


def _check_choice(mask: Mask, q_positions, kv_positions, row: int, head: int) -> None:
    q_len, kv_len = q_positions.shape[1], kv_positions.shape[1]
    shape = jax.eval_shape(
        lambda m: m.materialize(q_len, kv_len, q_positions=q_positions, kv_positions=kv_positions),
        mask,
    ).shape
    for name, value, count in (("row", row, shape[0]), ("head", head, shape[1])):
        # A mask without rows serves any row.
        if value < 0 or (count > 1 and value >= count):
            raise ValueError(f"{name} takes an int from 0 to {count - 1}, got {value}")


def _select_row(positions: jax.Array, row: int) -> jax.Array:
    return positions[row : row + 1] if positions.shape[0] > 1 else positions


def _choose_cell_size(length: int, block: int | None) -> int:
    """Return the slots along a cell's side: few enough cells, and none in two blocks."""
    least = -(-length // _CELLS)
    if block is None:
        return least
    return next((size for size in range(least, block) if block % size == 0), block)


@dataclasses.dataclass(frozen=True)
class _SlotSample:
    """Slots of one axis that a picture looks at; `axattn._mask_parts.Span` is of consecutive ones.

    Attributes:
      slots: int32 ``[cells * per_cell]``.
      positions: int32 ``[B or 1, cells * per_cell]``.
      real: bool, as ``slots``: False behind the end.
      per_cell: slots that are looked at in a cell.
    """

    slots: jax.Array
    positions: jax.Array
    real: np.ndarray
    per_cell: int

    @staticmethod
    def create(length: int, cell: int, positions: jax.Array) -> _SlotSample:
        """Choose evenly spaced slots of each cell, where a cell has too many."""
        cells = -(-length // cell)
        per_cell = max(1, min(cell, _SAMPLES // cells))
        steps = np.arange(per_cell) * cell // per_cell
        slots = (np.arange(cells)[:, None] * cell + steps).reshape(-1)
        real = slots < length
        there = jnp.asarray(np.minimum(slots, length - 1), jnp.int32)
        return _SlotSample(there, jnp.take(positions, there, axis=1), real, per_cell)

    def take(self, array: jax.Array, axis: int) -> jax.Array:
        """Return an array's elements at the slots."""
        return array if array.shape[axis] == 1 else jnp.take(array, self.slots, axis)

    def select_cells(self, start: int, size: int) -> _SlotSample:
        """Return ``size`` cells from cell ``start`` on."""
        some = slice(start * self.per_cell, (start + size) * self.per_cell)
        return _SlotSample(
            self.slots[some], self.positions[:, some], self.real[some], self.per_cell
        )

    def count_slots(self) -> np.ndarray:
        """Count the slots of each cell that are not behind the end."""
        return self.real.reshape(-1, self.per_cell).sum(1)


def _compute_shares(mask: Mask, queries: _SlotSample, keys: _SlotSample, head: int) -> np.ndarray:
    """Compute the share of each cell that may be attended to: float64 ``[down, across]``."""
    strips = []
    across = len(keys.slots)
    per_strip = max(1, _PAIRS // (across * queries.per_cell))
    total = len(queries.slots) // queries.per_cell
    for start in range(0, total, per_strip):
        strip = queries.select_cells(start, min(per_strip, total - start))
        allowed = compute_mask_tile(mask, strip, keys)
        tile = np.ones((1, 1, 1, 1), bool) if allowed is None else np.asarray(allowed)
        tile = tile[0, head if tile.shape[1] > 1 else 0]
        tile = tile & strip.real[:, None] & keys.real
        sums = tile.reshape(len(strip.slots), -1, keys.per_cell).sum(2, dtype=np.int32)
        sums = sums.reshape(-1, queries.per_cell, sums.shape[1]).sum(1)
        strips.append(sums / np.outer(strip.count_slots(), keys.count_slots()))
    return np.concatenate(strips)


def _mix_colors(shares: np.ndarray, masked: str, attended: str) -> np.ndarray:
    """Mix two colours by shares: RGB ``[..., 3]`` in 0 to 1."""
    first, last = _axes.parse_color(masked), _axes.parse_color(attended)
    return first + shares[..., None] * (last - first)


def _color_elements(shares: np.ndarray) -> tuple[np.ndarray, dict[str, tuple[str, ...]]]:
    handles: dict[str, tuple[str, ...]] = {"attended": (_style.FULL,), "masked": (_style.EMPTY,)}
    return _mix_colors(shares, _style.EMPTY, _style.FULL), handles


def _color_blocks(
    shares: np.ndarray, states: np.ndarray, cells: list[int], blocks: tuple[int, int]
) -> tuple[np.ndarray, dict[str, tuple[str, ...]]]:
    down, across = (
        np.arange(count) * cell // block
        for count, cell, block in zip(shares.shape, cells, blocks, strict=True)
    )
    state = states[np.ix_(down, across)][..., None]
    partial = _mix_colors(shares, _style.PARTIAL_MASKED, _style.PARTIAL_ATTENDED)
    pixels = np.where(state == FULL, _axes.parse_color(_style.FULL), partial)
    pixels = np.where(state == EMPTY, _axes.parse_color(_style.EMPTY), pixels)
    full, some, empty = ((states == kind).sum() for kind in (FULL, PARTIAL, EMPTY))
    both = (_style.PARTIAL_MASKED, _style.PARTIAL_ATTENDED)
    return pixels, {
        f"full: {full}": (_style.FULL,),
        f"partial: {some} (dark: attended)": both,
        f"empty: {empty}": (_style.EMPTY,),
    }


def _draw_lines(ax: Axes, lengths: tuple[int, int], sizes: tuple[int, int], color: str) -> None:
    down, across = (np.arange(s, n, s) - 0.5 for n, s in zip(lengths, sizes, strict=True))
    if max(len(down), len(across)) < _MOST_LINES:
        ax.hlines(down, -0.5, lengths[1] - 0.5, color=color, linewidth=0.5)
        ax.vlines(across, -0.5, lengths[0] - 0.5, color=color, linewidth=0.5)
