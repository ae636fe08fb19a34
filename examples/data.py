"""The text that the example model reads: made-up sentences, facts, and questions about them.

    a tired baker carried the lamp to the harbour .
    the code of amber is 4 8 2 1 .
    ...
    what is the code of amber ? 4 8 2 1 .

A token is a word, a digit or a punctuation mark. Nothing here is learned by heart: which name has
which code is drawn anew for each document, so an answer has to be read in the text before it.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import numpy as np

NAMES = tuple(
    "amber agate basalt beryl birch cedar chalk clay cobalt copper coral cotton ebony elm fern "
    "flint garnet granite hazel heather iron ivory ivy jade jasper juniper lapis laurel linen "
    "lotus maple marble mica mint moss myrtle oak onyx opal pearl pine quartz reed ruby saffron "
    "sage silk slate".split()
)
DIGITS = tuple("0123456789")
CODE_DIGITS = 4

_ADJECTIVES = "old young tired happy quiet clever careless proud shy busy".split()
_PEOPLE = "baker sailor farmer teacher painter miller tailor doctor singer captain".split()
_DID = "carried sold lost found painted borrowed repaired forgot hid bought".split()
_THINGS = "lamp boat basket mirror ladder kettle violin blanket letter wheel".split()
_PREPOSITIONS = "to from near behind under".split()
_PLACES = "harbour market bridge tower garden river mill station school forest".split()
_TIMES = "morning evening winter summer night spring".split()
_WENT = "walked ran sailed travelled returned".split()
_FUNCTION_WORDS = "the a of is what code in and then counted things".split()

VOCABULARY = (
    ".",
    "?",
    *DIGITS,
    *NAMES,
    *_ADJECTIVES,
    *_PEOPLE,
    *_DID,
    *_THINGS,
    *_PREPOSITIONS,
    *_PLACES,
    *_TIMES,
    *_WENT,
    *_FUNCTION_WORDS,
)
_IDS = {word: i for i, word in enumerate(VOCABULARY)}
STOP = _IDS["."]


def encode(text: str) -> list[int]:
    """Token ids of words, digits and marks that blanks separate.

    Raises:
      ValueError: a word that the vocabulary does not have.
    """
    unknown = [word for word in text.split() if word not in _IDS]
    if unknown:
        raise ValueError(f"text has {unknown[0]!r}, which is not one of VOCABULARY's words")
    return [_IDS[word] for word in text.split()]


def decode(tokens: Sequence[int]) -> str:
    """The text of token ids, words apart by blanks."""
    return " ".join(VOCABULARY[token] for token in tokens)


def filler(rng: random.Random) -> str:
    """A sentence without a fact. Some have digits, which an answer must not be taken from."""
    pick = rng.choice
    kind = rng.random()
    if kind < 0.5:
        return (
            f"the {pick(_ADJECTIVES)} {pick(_PEOPLE)} {pick(_DID)} a {pick(_THINGS)} "
            f"{pick(_PREPOSITIONS)} the {pick(_PLACES)} ."
        )
    if kind < 0.8:
        return (
            f"in the {pick(_TIMES)} the {pick(_PEOPLE)} {pick(_WENT)} "
            f"{pick(_PREPOSITIONS)} the {pick(_PLACES)} and {pick(_DID)} a {pick(_THINGS)} ."
        )
    return f"then a {pick(_PEOPLE)} counted {pick(DIGITS)} {pick(DIGITS)} things ."


def new_code(rng: random.Random) -> str:
    return " ".join(rng.choice(DIGITS) for _ in range(CODE_DIGITS))


def fact(name: str, code: str) -> str:
    return f"the code of {name} is {code} ."


def question(name: str) -> str:
    return f"what is the code of {name} ?"


def document(
    rng: random.Random, length: int, filler_share: tuple[float, float] = (0.1, 0.9)
) -> list[int]:
    """``length`` tokens of text.

    How much of it is filler is drawn for each document, between the two shares. The other
    sentences are facts and questions, about half of each, so that there are always several facts
    to tell apart.
    """
    share = rng.uniform(*filler_share)
    names = rng.sample(NAMES, len(NAMES))
    codes: dict[str, str] = {}
    tokens: list[int] = []
    while len(tokens) < length:
        if rng.random() < share:
            text = filler(rng)
        elif not codes or (names and rng.random() < 0.5):
            name = names.pop()
            codes[name] = new_code(rng)
            text = fact(name, codes[name])
        else:
            name = rng.choice(list(codes))
            text = f"{question(name)} {codes[name]} ."
        tokens += encode(text)
    return tokens[:length]


def documents(
    rng: random.Random, batch: int, length: int, filler_share: tuple[float, float] = (0.1, 0.9)
) -> np.ndarray:
    """int32 [batch, length]: a document per row."""
    return np.array([document(rng, length, filler_share) for _ in range(batch)], np.int32)


def is_answer(tokens: np.ndarray) -> np.ndarray:
    """bool [..., T]: the digits after a question, which can be told from the text before them."""
    asked = np.zeros(tokens.shape, bool)
    marks = tokens == _IDS["?"]
    for i in range(1, CODE_DIGITS + 1):
        asked[..., i:] |= marks[..., :-i]
    return asked


@dataclasses.dataclass(frozen=True)
class Needle:
    """A question about one fact in a long text.

    prompt: int32 [length], which ends with the question. answer: int32 [CODE_DIGITS + 1], the code
    and the full stop.
    """

    prompt: np.ndarray
    answer: np.ndarray


def needle(rng: random.Random, length: int, depth: float, other_facts: int = 8) -> Needle:
    """A fact about ``depth`` of the way into filler, asked for at the end of ``length`` tokens.

    Args:
      depth: from 0 (the first sentence) to 1 (the last one before the question).
      other_facts: facts about other names, at places of their own.

    Raises:
      ValueError: a length that the facts and the question do not fit into.
    """
    name, *others = rng.sample(NAMES, 1 + other_facts)
    code = new_code(rng)
    needle_tokens, end = encode(fact(name, code)), encode(question(name))
    distractors = [encode(fact(other, new_code(rng))) for other in others]
    room = length - len(end) - sum(map(len, [needle_tokens, *distractors]))
    if room < 0:
        raise ValueError(
            f"length must be at least {length - room} for a question and {1 + other_facts} facts, "
            f"got {length}"
        )
    sentences = distractors
    while room > 0:
        sentences.append(encode(filler(rng))[-room:])  # the last one is cut at its front
        room -= len(sentences[-1])
    rng.shuffle(sentences)
    sentences.insert(round(depth * len(sentences)), needle_tokens)
    prompt = [token for sentence in sentences for token in sentence] + end
    return Needle(np.array(prompt, np.int32), np.array([*encode(code), STOP], np.int32))


def needles(seed: int, length: int, count: int, other_facts: int = 8) -> tuple[np.ndarray, ...]:
    """``count`` needles whose depths go evenly from 0 to 1.

    Returns:
      prompts int32 [count, length], answers int32 [count, CODE_DIGITS + 1].
    """
    rng = random.Random(seed)
    made = [needle(rng, length, i / max(count - 1, 1), other_facts) for i in range(count)]
    return np.stack([n.prompt for n in made]), np.stack([n.answer for n in made])
