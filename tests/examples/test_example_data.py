"""The made-up text says what it is for: facts first, questions that they answer."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from examples import data


def test_every_sentence_has_words_of_the_vocabulary():
    assert len(set(data.VOCABULARY)) == len(data.VOCABULARY)
    text = "what is the code of amber ? 4 8 2 1 ."
    assert data.decode(data.encode(text)) == text
    assert data.encode(".") == [data.STOP]
    with pytest.raises(ValueError, match="'zebra'"):
        data.encode("the zebra")


def test_documents_can_be_answered_and_are_not_all_the_same():
    tokens = data.documents(random.Random(0), 20, 300)
    assert tokens.shape == (20, 300) and tokens.dtype == np.int32
    asked = 0
    for row in tokens:
        text = data.decode(row)
        facts = dict(re.findall(r"code of (\w+) is ((?:\d ?){4})\.", text))
        for found in re.finditer(r"code of (\w+) \? ((?:\d ){4})\.", text):
            name, code = found.groups()
            assert facts[name] == code
            assert text.index(f"code of {name} is") < found.start()
            asked += 1
    assert asked > 40
    assert len({data.decode(row) for row in tokens}) == 20


def test_answers_are_the_digits_behind_questions():
    tokens = np.array(
        data.encode("the code of elm is 1 2 3 4 . what is the code of elm ? 1 2 3 4 .")
    )
    assert data.decode(tokens[data.is_answer(tokens)]) == "1 2 3 4"
    assert data.is_answer(tokens).nonzero()[0].tolist() == [17, 18, 19, 20]


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_needle(depth):
    needle = data.needle(random.Random(3), 500, depth)
    text, answer = data.decode(needle.prompt), data.decode(needle.answer)
    assert len(needle.prompt) == 500
    name = re.search(r"what is the code of (\w+) \?$", text).group(1)
    facts = re.findall(rf"code of {name} is ((?:\d ){{4}}\.)", text)
    assert facts == [answer]
    assert len(re.findall(r"code of \w+ is", text)) == 9
    at = text.index(f"code of {name} is") / len(text)
    assert abs(at - depth) < 0.06


def test_a_needle_needs_room():
    with pytest.raises(ValueError, match="length must be at least 97"):
        data.needle(random.Random(0), 96, 0.5)
