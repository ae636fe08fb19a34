"""A fact anywhere in a long prompt is answered alike with every cache, chunk size and precision."""

from __future__ import annotations

import functools
import itertools
import random

import numpy as np
import pytest

from examples import data, quality
from examples.caches import KINDS, make_caches
from examples.generation import jit_generate

pytestmark = pytest.mark.ci
LONGEST = 1000
QUESTIONS = 9  # at depths of 0, 1/8, ... 1
CHUNK_SIZES = (16, 96, 1000)
# int4 is not among them: test_quantized_quality.py shows what it costs.
DTYPES = ("float32", "bfloat16", "int8", "float8_e4m3fn")
# Each two of a kind, a precision and a chunk size meet before a release; .ci/run has a ring and pages.
MEETINGS = [
    pytest.param(
        kind, dtype, CHUNK_SIZES[(i + j) % 3], marks=() if i == j > 0 else pytest.mark.exhaustive
    )
    for (i, kind), (j, dtype) in itertools.product(enumerate(KINDS), enumerate(DTYPES))
]


@functools.cache
def questions():
    """Prompts [B, T] of several lengths, their lengths [B] and the answers [B, A]."""
    lengths = [LONGEST - 61 * (i % 4) for i in range(QUESTIONS)]
    prompts = np.zeros((QUESTIONS, LONGEST), np.int32)
    answers = []
    for row, length in enumerate(lengths):
        made, answer = data.needles(100 + row, length, QUESTIONS)
        prompts[row, :length] = made[row]  # row i has its fact at i / (B - 1) of the text
        answers.append(answer[row])
    return prompts, np.array(lengths), np.stack(answers)


def answers_of(model, kind, dtype, chunk_size):
    prompts, lengths, answers = questions()
    made = make_caches(
        model.config, kind, QUESTIONS, LONGEST + answers.shape[1], dtype=dtype, page_size=32
    )
    got = jit_generate(
        model,
        made,
        prompts,
        lengths,
        max_new_tokens=answers.shape[1],
        stop_token=data.STOP,
        chunk_size=chunk_size,
    )
    assert not any(np.asarray(cache.overflowed).any() for cache in got.caches)
    return np.asarray(got.tokens)


def test_without_a_cache_at_any_depth_and_length(trained):
    for length in (200, LONGEST):
        assert quality.answered(trained, *data.needles(9, length, QUESTIONS)) == 1.0


def test_a_fact_that_is_not_there_is_not_answered(trained):
    """What the other tests see is read in the text: without it, the code is a guess."""
    prompts, answers = data.needles(9, 300, 20, other_facts=3)
    _, others = data.needles(10, 300, 20, other_facts=3)
    changed = np.array(prompts)
    for row, (prompt, code, other) in enumerate(zip(prompts, answers, others, strict=True)):
        windows = np.lib.stride_tricks.sliding_window_view(prompt, len(code))
        (at,) = np.nonzero((windows == code).all(1))[0]
        changed[row, at : at + len(code)] = other
    assert quality.answered(trained, prompts, answers) == 1.0
    assert quality.answered(trained, changed, answers) == 0.0
    assert quality.answered(trained, changed, others) == 1.0


@pytest.mark.parametrize(
    "kind, dtype, chunk_size", [("ring", "int8", 24), ("paged", "float8_e4m3fn", 16)]
)
def test_at_every_place(trained, kind, dtype, chunk_size):
    """Facts that lie on any side of the borders of chunks, rings and pages."""
    rng = random.Random(0)
    name = rng.choice(data.NAMES)
    code = data.new_code(rng)
    fact, question = data.encode(data.fact(name, code)), data.encode(data.question(name))
    want = [*data.encode(code), data.STOP]
    length, step = 200, 5  # 5 divides neither 16 nor 64: remainders of all sizes come up
    text = []
    while len(text) < length - len(fact) - len(question):
        text += data.encode(data.filler(rng))
    text = text[: length - len(fact) - len(question)]
    prompts = np.array(
        [text[:at] + fact + text[at:] + question for at in range(0, len(text) + 1, step)], np.int32
    )
    made = make_caches(
        trained.config,
        kind,
        len(prompts),
        length + len(want),
        dtype=dtype,
        page_size=16,
        max_append=16,
    )
    got = jit_generate(
        trained,
        made,
        prompts,
        max_new_tokens=len(want),
        stop_token=data.STOP,
        chunk_size=chunk_size,
    )
    np.testing.assert_array_equal(got.tokens, np.tile(want, (len(prompts), 1)))


@pytest.mark.parametrize("kind, dtype, chunk_size", MEETINGS)
def test_over_every_cache(trained, kind, dtype, chunk_size):
    np.testing.assert_array_equal(answers_of(trained, kind, dtype, chunk_size), questions()[2])
