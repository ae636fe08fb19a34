"""torch's scaled_dot_product_attention, on the processors that axattn's calls run on.

torch has a process of its own, since two pools of threads in one would disturb one another, and is
timed from there in turn with what runs here: while one process computes, the other one waits, at a
pipe, with all its threads asleep.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from benchmarks.harness import functions, paired, processes

# Largest difference from axattn's result, in parts of its largest element: a few roundings.
TOLERANCES = {"float32": 1e-5, "bfloat16": 2**-5, "float16": 2**-8}

WARM_UP = 0.5  # seconds


def find_refusal() -> str | None:
    """Why there is nothing to measure against, or None."""
    if importlib.util.find_spec("torch") is None:
        return "is not installed (extra peers)"
    if jax.default_backend() != "cpu":
        return f"is measured on a CPU only, not on {jax.default_backend()}"
    return None


@dataclasses.dataclass(frozen=True)
class Problem:
    """A call in numbers, float32 on the host whatever ``dtype`` it computes in.

    Attributes:
      arrays: query [B, T, N, H], key and value [B, S, K, H].
      expected: axattn's output; or its loss and gradients (`functions.in_direction`).
    """

    arrays: tuple[np.ndarray, ...]
    expected: tuple[np.ndarray, ...]
    dtype: str
    direction: str
    is_causal: bool

    @classmethod
    def from_result(cls, args: Any, result: Any, **options: Any) -> Problem:
        """The problem of axattn's arguments and of what `functions.in_direction` made of them."""
        arrays, expected = (
            tuple(np.asarray(x, np.float32) for x in jax.tree.leaves(tree))
            for tree in (args, result)
        )
        return cls(arrays, expected, str(args[0].dtype), **options)


class TorchPeer:
    """A `paired.Timer` of torch's function for the problem that it was given last."""

    def __init__(self):
        self._worker = processes.Worker()

    def prepare(self, problem: Problem) -> None:
        """Has torch compute the problem once.

        Raises:
          RuntimeError: its result is not the expected one.
        """
        list(self._worker.run(_Prepare(problem)))

    def __call__(self, calls: int, samples: int) -> float:
        paired.wait_until_idle()
        (seconds,) = self._worker.run(_Time(calls, samples))
        return seconds

    def close(self) -> None:
        self._worker.close()


# ---- in torch's process -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Prepare:
    problem: Problem

    def __call__(self) -> Iterator[Any]:
        global _step
        _step = make_step(self.problem)
        check(_step(), self.problem)
        # The first calls take up to 25 times as long (0.5 ms: bfloat16, T=128), more than one does.
        start = time.perf_counter()
        while time.perf_counter() - start < WARM_UP:
            _step()
        yield from ()


@dataclasses.dataclass(frozen=True)
class _Time:
    calls: int
    samples: int

    def __call__(self) -> Iterator[float]:
        seconds = paired.time_calls(_step, self.calls, self.samples)
        paired.wait_until_idle()
        yield seconds


_step: Callable[[], Any]  # what `_Prepare` made


def make_step(problem: Problem) -> Callable[[], Any]:
    """A function without arguments that returns torch's tensors in the order of ``expected``.

    Its arrays are contiguous in the order that torch takes, [B, N, T, H]: views of [B, T, N, H] are
    slower.
    """
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    attend = functools.partial(
        torch.nn.functional.scaled_dot_product_attention,
        is_causal=problem.is_causal,
        enable_gqa=True,
    )
    args = [
        torch.from_numpy(x).to(getattr(torch, problem.dtype)).transpose(1, 2).contiguous()
        for x in problem.arrays
    ]
    if problem.direction == functions.DIRECTIONS[0]:

        def forward():
            with torch.inference_mode():
                return [attend(*args)]

        return forward
    for x in args:
        x.requires_grad_()

    def both():
        loss = attend(*args).float().square().mean()
        return [loss.detach(), *torch.autograd.grad(loss, args)]

    return both


def check(tensors: list[Any], problem: Problem) -> None:
    """RuntimeError where a result differs from the expected one by more than roundings."""
    limit = TOLERANCES[problem.dtype]
    for number, (tensor, expected) in enumerate(zip(tensors, problem.expected, strict=True)):
        got = tensor.float()
        got = (got.transpose(1, 2) if got.ndim == 4 else got).numpy()
        error = np.abs(got - expected).max() / np.abs(expected).max()
        if not error <= limit:  # NaN is an error, too
            raise RuntimeError(
                f"torch's result {number} of {len(tensors)} differs from axattn's by {error:.1e} "
                f"of its largest element; at most {limit:.1e} is expected"
            )
