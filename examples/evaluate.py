"""What each cache costs the trained example model, in quality.

    python examples/evaluate.py

Reads unseen texts of 1024 tokens into caches of each kind and precision and compares with the pass
without a cache: KL divergence in nats, of all tokens and of the digits of answers; perplexity; how
often the likeliest token is the same. "answered": how many questions at the end of 1024 tokens,
each about one of 40 facts there, `generate` answers right.
"""

from __future__ import annotations

import pathlib
import random
import sys
from collections.abc import Sequence

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks.harness import command
from examples import caches, checkpoint, data, quality

_KINDS = flags.DEFINE_list("kinds", list(caches.KINDS), "of caches")
_DTYPES = flags.DEFINE_list(
    "dtypes", ["float32", "bfloat16", "int8", "float8_e4m3fn", "int4"], "of caches"
)
_CHUNK_SIZE = flags.DEFINE_integer("chunk_size", 128, "tokens at a time; divides 1024")

LENGTH, TEXTS, QUESTIONS, FACTS = 1024, 4, 40, 40


def main(argv: Sequence[str]) -> None:
    model = checkpoint.load()
    tokens = data.documents(random.Random(1), TEXTS, LENGTH)
    prompts, answers = data.needles(1, LENGTH, QUESTIONS, FACTS - 1)
    truth = quality.logits_of(model, tokens)
    print("kind   dtype         KL, all  KL, answers  perplexity  same token  answered")
    for kind in _KINDS.value:
        for dtype in _DTYPES.value:
            made = caches.make_caches(model.config, kind, TEXTS, LENGTH, dtype=dtype)
            logits = quality.logits_over(model, made, tokens, chunk_size=_CHUNK_SIZE.value)
            got = quality.difference(truth, logits, tokens)
            asked = quality.difference(truth, logits, tokens, data.is_answer(tokens))
            room = LENGTH + answers.shape[1]
            made = caches.make_caches(model.config, kind, QUESTIONS, room, dtype=dtype)
            right = quality.answered_over(
                model, made, prompts, answers, chunk_size=_CHUNK_SIZE.value
            )
            print(
                f"{kind:6} {dtype:13} {got.divergence:8.1e}  {asked.divergence:11.1e}  "
                f"{got.perplexity_ratio:9.5f}x  {got.agreement:10.2%}  {right:8.1%}",
                flush=True,
            )


if __name__ == "__main__":
    command.run(main)
