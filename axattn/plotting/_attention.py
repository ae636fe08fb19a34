"""Attention maps: which keys a query looked at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from axattn.plotting import _axes, _style
from axattn.plotting._library import import_pyplot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SOWN = "attention_weights"
# More labels at ticks would lie over each other.
_MOST_LABELS = 24
# Inches of all pictures side by side; with labels and colours a figure has nine.
_WIDTH = 7.2


def sown_weights(intermediates: Any) -> dict[str, jax.Array]:
    """Collect the attention weights that layers sowed, by their paths in the model.

    Layers of axattn and of Flax sow them when they are called with ``sow_weights=True``.

    Args:
      intermediates: Linen's ``intermediates`` collection, which ``apply(...,
        mutable=["intermediates"])`` returns, or the state that ``nnx.capture(model,
        nnx.Intermediate)(x)`` returns behind the result (``nnx.pop(model, nnx.Intermediate)`` in
        older code); or a tree that has these in it.

    Returns:
      For each ``attention_weights`` its path, joined by slashes
      (``"block_0/attention/attention_weights"``), and the weights ``[..., N, T, S]`` in the dtype
      in which the layer sowed them. Where a layer was called several times, the number of the call
      stands behind the path.

    Raises:
      ValueError: there are none.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from axattn import linen, plotting
      >>> layer = linen.MultiHeadAttention(num_heads=2)
      >>> x = jnp.ones((1, 4, 8))
      >>> params = layer.init(jax.random.key(0), x)
      >>> _, state = layer.apply(params, x, sow_weights=True, mutable=["intermediates"])
      >>> {k: w.shape for k, w in plotting.sown_weights(state["intermediates"]).items()}
      {'attention_weights': (1, 2, 4, 4)}
    """
    found: dict[str, list[jax.Array]] = {}
    for path, weights in jax.tree_util.tree_flatten_with_path(intermediates)[0]:
        names = [jax.tree_util.keystr((entry,), simple=True) for entry in path]
        if _SOWN in names:
            # After the name come the number of the call and, in NNX, the variable's field.
            place = "/".join(names[: names.index(_SOWN) + 1])
            found.setdefault(place, []).append(weights)
    if not found:
        raise ValueError(
            f"intermediates takes a tree in which a layer sowed {_SOWN}, got none: call the layer "
            'with sow_weights=True, and apply with mutable=["intermediates"]'
        )
    return {
        place if len(calls) == 1 else f"{place}/{number}": weights
        for place, calls in found.items()
        for number, weights in enumerate(calls)
    }


def plot_attention(
    weights: jax.Array,
    *,
    row: int = 0,
    heads: int | Sequence[int] | None = None,
    query_labels: Sequence[str] | None = None,
    key_labels: Sequence[str] | None = None,
    title: str | None = None,
) -> Figure:
    """Draw attention weights, one picture per head, with one scale of colours for all.

    Queries go down, keys to the right. The scale begins at 0 and ends at the largest weight that
    is shown; what is below 0 has the colour of 0.

    Args:
      weights: ``[T, S]``, ``[N, T, S]`` or ``[B, N, T, S]``, floating point; those that
        `sown_weights` finds, or the softmax of any scores.
      row: the batch row to draw.
      heads: the heads to draw, an int or several; by default all.
      query_labels: ``T`` names of the queries, tokens for instance. Of more than 24 some are left
        out.
      key_labels: ``S`` names of the keys, likewise.
      title: above everything.

    Returns:
      The figure.

    Raises:
      ValueError: weights of another rank or without numbers, a row or head that they do not have,
        or another number of labels than there are queries or keys.
      ImportError: matplotlib is not installed.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from axattn import plotting
      >>> weights = jax.nn.softmax(jnp.arange(24.0).reshape(2, 3, 4))  # N=2, T=3, S=4
      >>> figure = plotting.plot_attention(weights, query_labels="abc", key_labels="wxyz")
      >>> [ax.get_title() for ax in figure.axes[:2]]
      ['head 0', 'head 1']
    """
    maps, heads = _select_maps(weights, row, heads)
    _, queries, keys = maps.shape
    for name, labels, count in (
        ("query_labels", query_labels, queries),
        ("key_labels", key_labels, keys),
    ):
        if labels is not None and len(labels) != count:
            raise ValueError(f"{name} takes {count} names, got {len(labels)}")

    across = _count_columns(len(maps))
    down = math.ceil(len(maps) / across)
    side = _WIDTH / max(across, 2)
    tall = side * min(1.5, max(0.35, queries / keys))
    # Names of keys stand upright, under the last row and where it is short.
    names = 0.08 * max(map(len, map(str, key_labels)), default=0) if key_labels is not None else 0.0
    names *= 1 + (len(maps) % across > 0)
    figure, axes = import_pyplot().subplots(
        down,
        across,
        figsize=(1.8 + side * across, 0.9 + names + (0.35 + tall) * down),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    top = max(0.0, float(maps[np.isfinite(maps)].max())) or 1.0
    for axis in axes.flat[len(maps) :]:
        axis.set_visible(False)
    for axis, head, values in zip(axes.flat, heads, maps, strict=False):
        image = axis.imshow(
            values, cmap=_style.SEQUENTIAL, vmin=0.0, vmax=top, aspect=_choose_aspect(queries, keys)
        )
        axis.set_title("weights" if np.ndim(weights) == 2 else f"head {head}", fontsize=10)
        _axes.set_slot_ticks(axis, queries, keys)
    for axis in axes[:, 0]:
        _label_axis(axis.yaxis, query_labels)
        axis.set_ylabel("query")
    for column in range(across):
        # The last row may be short.
        lowest = axes[(len(maps) - 1 - column) // across][column]
        _label_axis(lowest.xaxis, key_labels, rotation=90)
        lowest.tick_params(labelbottom=True)
        lowest.set_xlabel("key")
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
    bar.set_label("weight")
    bar.ax.tick_params(labelsize=9)
    if title is not None:
        figure.suptitle(title, fontsize=11)
    return figure


def _count_columns(count: int) -> int:
    most = 3 if count in (1, 2, 3, 6) else 4 if count <= 16 else 8
    return min(count, 2 if count == 4 else most)


def _select_maps(weights: Any, row: int, heads: Any) -> tuple[np.ndarray, list[int]]:
    """Return the maps to draw, float32 ``[heads, T, S]``, and which heads these are."""
    maps = np.asarray(weights)
    if maps.ndim not in (2, 3, 4) or 0 in maps.shape:
        raise ValueError(f"weights takes [T, S], [N, T, S] or [B, N, T, S], got shape {maps.shape}")
    maps = maps.astype(np.float32)
    if maps.ndim == 4:
        _check_index("row", row, len(maps))
        maps = maps[row]
    elif row:
        raise ValueError(f"row takes 0 for weights without rows, got {row}")
    maps = maps[None] if maps.ndim == 2 else maps
    if heads is None:
        chosen = list(range(len(maps)))
    else:
        chosen = [int(head) for head in np.atleast_1d(np.asarray(heads, np.int64))]
        if not chosen:
            raise ValueError("heads takes an int or several, got none")
        for head in chosen:
            _check_index("heads", head, len(maps))
    maps = maps[chosen]
    if not np.isfinite(maps).any():
        raise ValueError("weights takes finite numbers, got none")
    return maps, chosen


def _check_index(name: str, value: int, count: int) -> None:
    if not 0 <= value < count:
        raise ValueError(f"{name} takes ints from 0 to {count - 1}, got {value}")


def _choose_aspect(queries: int, keys: int) -> str:
    return "equal" if 0.25 <= queries / keys <= 4 else "auto"


def _label_axis(axis: Any, labels: Sequence[str] | None, **options: Any) -> None:
    if labels is None:
        return
    step = math.ceil(len(labels) / _MOST_LABELS)
    ticks = range(0, len(labels), step)
    # A lone dollar sign in a token is no formula.
    names = [str(labels[i]).replace("$", r"\$") for i in ticks]
    axis.set_ticks(ticks, names, fontsize=8, **options)
