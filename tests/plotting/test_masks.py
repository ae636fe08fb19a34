from __future__ import annotations

import re

import numpy as np
import pytest

from axattn import Mask
from axattn._mask_parts import EMPTY, FULL, PARTIAL
from axattn.plotting import _axes, _style, plot_mask
from tests.plotting.pictures import check_legible, pixels, rendered
from tests.tiers import ci

IDS = np.repeat(np.arange(4), [10, 30, 17, 23])
MASKS = {
    "causal": Mask.causal(),
    "window": Mask.causal() & Mask.window(20, 0),
    "segments": Mask.segments(IDS, np.pad(IDS, (0, 16), constant_values=3)) & Mask.causal(),
    "prefix": Mask.prefix(37),
    "lengths": Mask.causal() & Mask.lengths(70, 50),
    "dense": Mask.dense(np.random.default_rng(0).random((80, 96)) < 0.02),
    "everything": Mask(),
}


@pytest.mark.parametrize(
    "name",
    ["causal", "dense", *ci(*(n for n in MASKS if n not in ("causal", "dense")))],
)
def test_blocks_have_the_colours_of_their_states(name):
    """In what is rendered, and elements are seen inside of partial blocks, nowhere else."""
    mask, (q_len, kv_len), (block_q, block_kv) = MASKS[name], (80, 96), (16, 24)
    ax = plot_mask(mask, q_len, kv_len, block_q=block_q, block_kv=block_kv)
    image = rendered(ax.figure)
    states = np.asarray(mask.block_map(q_len, kv_len, block_q, block_kv))[0]
    allowed = np.asarray(mask.materialize(q_len, kv_len))[0, 0]
    state = np.kron(states, np.ones((block_q, block_kv), int))[..., None]
    inside = np.where(
        allowed[..., None],
        _axes.parse_color(_style.PARTIAL_ATTENDED),
        _axes.parse_color(_style.PARTIAL_MASKED),
    )
    outside = _axes.parse_color(_style.EMPTY), _axes.parse_color(_style.FULL)
    want = np.select([state == EMPTY, state == FULL], outside, inside)
    np.testing.assert_allclose(pixels(ax, allowed.shape, image), want, atol=0.02)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    counts = [int((states == state).sum()) for state in (FULL, PARTIAL, EMPTY)]
    assert [int(label.split()[1]) for label in labels] == counts
    check_legible(ax.figure)


def test_elements_without_blocks():
    mask = Mask.window(3, 1)
    ax = plot_mask(mask, 9, 12, title="a title")
    image, allowed = rendered(ax.figure), np.asarray(mask.materialize(9, 12))[0, 0]
    want = np.where(
        allowed[..., None], _axes.parse_color(_style.FULL), _axes.parse_color(_style.EMPTY)
    )
    np.testing.assert_allclose(pixels(ax, (9, 12), image), want, atol=0.02)
    assert ax.get_title() == "a title"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["attended", "masked"]
    check_legible(ax.figure)


def test_queries_go_down_and_keys_to_the_right():
    ax = plot_mask(Mask.causal(), 8, 8)
    top, right = ax.transData.transform((7, 0)), ax.transData.transform((7, 7))
    left = ax.transData.transform((0, 7))
    assert top[1] > right[1] and right[0] > left[0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("key", "query")


def cells(ax):
    return np.asarray(ax.images[0].get_array())


def share(pixels, masked, attended):
    """The inverse of the mixture of two colours."""
    masked, attended = _axes.parse_color(masked), _axes.parse_color(attended)
    return (pixels - masked) @ (attended - masked) / ((attended - masked) @ (attended - masked))


def test_a_cell_shows_the_share_of_its_slots():
    array = np.random.default_rng(1).random((1030, 2050)) < 0.3
    found = share(cells(plot_mask(array, 1030, 2050)), _style.EMPTY, _style.FULL)
    assert found.shape == (344, 410)  # of 3 x 5 slots
    padded = np.full((344 * 3, 410 * 5), np.nan)
    padded[:1030, :2050] = array
    want = np.nanmean(padded.reshape(344, 3, 410, 5), axis=(1, 3))
    np.testing.assert_allclose(found, want, atol=1e-6)


def test_cells_lie_in_one_block():
    """Also where blocks and cells do not fit: 2500 slots in cells of 5, blocks of 35 have 7."""
    ax = plot_mask(Mask.causal(), 2500, 2500, block_q=35, block_kv=35)
    pixels = cells(ax)
    assert pixels.shape[:2] == (500, 500)
    states = np.asarray(Mask.causal().block_map(2500, 2500, 35, 35))[0]
    blocks = np.arange(500) // 7
    full = np.abs(pixels - _axes.parse_color(_style.FULL)).max(-1) < 1e-6
    np.testing.assert_array_equal(full, states[np.ix_(blocks, blocks)] == FULL)


def test_a_million_tokens():
    """Of a cell with 2048 x 2048 slots a sample is looked at."""
    length, window = 2**20, 2**18
    found = share(
        cells(plot_mask(Mask.causal() & Mask.window(window, 0), length, length)),
        _style.EMPTY,
        _style.FULL,
    )
    q, k = np.indices(found.shape)
    inside = (k < q) & (k > q - window // 2048)
    assert found[inside].min() == 1 and found[(k > q) | (k < q - window // 2048)].max() == 0
    assert np.all((found[k == q] > 0.45) & (found[k == q] < 0.6))


def test_rows_heads_and_positions():
    lengths = Mask.lengths(None, np.array([3, 7]))
    second = share(cells(plot_mask(lengths, 8, 8, row=1)), _style.EMPTY, _style.FULL)
    assert second[0].round().tolist() == [1] * 7 + [0]
    heads = np.zeros((1, 2, 8, 8), bool)
    heads[0, 1, 2, 3] = True
    one = share(cells(plot_mask(heads, 8, 8, head=1)), _style.EMPTY, _style.FULL)
    assert one.round().sum() == one[2, 3].round() == 1
    positions = np.array([[0, 1, 2, 3], [4, 5, 6, 7]])
    options = dict(q_positions=positions, row=1, block_q=2, block_kv=4)
    ax = plot_mask(Mask.causal(), 4, 8, **options)
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == ["full: 2", "partial: 2 (dark: attended)", "empty: 0"]
    # A mask that is the same for all rows and heads is that of any.
    plot_mask(Mask.causal(), 4, 8, row=3, head=3)


@pytest.mark.ci
@pytest.mark.parametrize("shape", [(1, 8192), (8192, 1), (137, 4096), (1, 1)])
def test_long_and_thin(shape):
    check_legible(plot_mask(Mask.causal(shape[1] // 2), *shape, block_q=64, block_kv=64).figure)


def test_beside_each_other(tmp_path):
    import matplotlib.pyplot as plt

    figure, beside = plt.subplots(1, 3, figsize=(9, 4), layout="constrained")
    for ax, name in zip(beside, ("causal", "window", "segments"), strict=True):
        assert plot_mask(MASKS[name], 80, 96, block_q=8, block_kv=8, ax=ax) is ax
    check_legible(figure)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(block_q=4), "block_q and block_kv go together, got block_q=4, block_kv=None"),
        (dict(block_q=0, block_kv=4), "block_q takes an int >= 1, got 0"),
        (dict(block_q=1, block_kv=1, q_len=5000), "at most 4096 blocks of 5000 slots, got 1"),
        (dict(q_len=0), "q_len takes an int >= 1, got 0"),
        (dict(kv_len=2.0), "kv_len takes an int >= 1, got 2.0"),
        (dict(row=2), "row takes an int from 0 to 1, got 2"),
        (dict(row=-1), "row takes an int from 0 to 1, got -1"),
        (dict(head=3), "head takes an int from 0 to 2, got 3"),
        (dict(q_positions=np.arange(4)), "q_positions takes int [8] or [B, 8], got shape (4,)"),
        (dict(kv_positions=np.arange(9)), "kv_positions takes int [8] or [B, 8], got shape (9,)"),
    ],
)
def test_errors(options, words):
    mask = Mask.lengths(None, np.array([3, 7])) & Mask.dense(np.ones((3, 1, 8), bool))
    options = {"q_len": 8, "kv_len": 8} | options
    with pytest.raises(ValueError, match=re.escape(words)):
        plot_mask(mask, **options)


def test_an_array_that_is_not_boolean():
    with pytest.raises(TypeError, match="mask takes a boolean array"):
        plot_mask(np.ones((4, 4)), 4, 4)
