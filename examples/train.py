"""Trains the example model on made-up text and writes its weights.

    python examples/train.py                     # writes examples/decoder.npz

At the end, prints how many questions about long texts of their own are answered right.
"""

from __future__ import annotations

import pathlib
import sys
import time
from collections.abc import Sequence

from absl import flags
from flax import nnx

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks.harness import command
from examples import checkpoint, data, quality, training
from examples.decoder import Config, Decoder

_OUTPUT = flags.DEFINE_string("output", str(checkpoint.TRAINED), "the .npz to write")
_SEED = flags.DEFINE_integer("seed", 0, "of the initial weights and of the text")


def main(argv: Sequence[str]) -> None:
    model = Decoder(Config(len(data.VOCABULARY)), rngs=nnx.Rngs(_SEED.value))
    state = nnx.Optimizer(model, training.optimizer(), wrt=nnx.Param)
    start = time.perf_counter()
    for count, tokens in enumerate(training.texts(_SEED.value), 1):
        answers, others = training.update(model, state, tokens, data.is_answer(tokens))
        if count % 50 == 0:
            print(
                f"update {count:4} of {training.UPDATES}, {tokens.shape[1] - 1:4} tokens: "
                f"loss of answers {answers:.3f}, of other tokens {others:.3f}; "
                f"{time.perf_counter() - start:.0f} s",
                flush=True,
            )
    checkpoint.save(_OUTPUT.value, model)
    model = checkpoint.load(_OUTPUT.value)  # what was rounded to float16 is what counts
    for length in (1024, 2048):
        share = quality.answered(model, *data.needles(1, length, 40))
        print(f"{length} tokens: {share:.1%} of questions answered right")


if __name__ == "__main__":
    command.run(main)
