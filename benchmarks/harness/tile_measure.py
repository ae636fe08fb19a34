"""Candidates for the Hopper kernels, checked and timed on the GPU at hand: a `Worker`'s job."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.harness import accuracy, environment, inputs, processes, rounds, tile_calls
from benchmarks.harness.tile_calls import Shape
from benchmarks.harness.tile_candidates import Place


@dataclasses.dataclass(frozen=True)
class Doing:
    """What comes next, so that whoever waits knows what did not come to an end."""

    tiles: Any


@dataclasses.dataclass(frozen=True)
class Measured:
    """One candidate: its time, or why it has none."""

    place: Place
    tiles: Any
    seconds: float | None = None
    error: float | None = None
    allowed: float | None = None
    reason: str | None = None
    note: str | None = None

    def tflops(self, shape: Shape) -> float | None:
        return self.seconds and flops(self.place, shape) / self.seconds / 1e12


@dataclasses.dataclass(frozen=True)
class Measure:
    """Times candidates for one row of the table; those that are wrong are not timed."""

    place: Place
    shape: Shape
    candidates: tuple[Any, ...]
    seconds: float

    def __call__(self) -> Iterator[Doing | Measured]:
        environment.choose_backend()
        platform = jax.default_backend()
        features = tile_calls.TYPICAL[self.place.kind]
        arrays, wanted = _problem(
            self.place.kind, self.place.head_dim, self.place.value_head_dim, self.shape
        )
        if self.place.kernel == "forward":
            arrays = {k: v for k, v in arrays.items() if k not in ("lse", "dout", "delta")}
        wanted = [wanted[name] for name in _RESULTS[self.place.kernel]]
        timers, found = {}, {}
        for tiles in self.candidates:
            yield Doing(tiles)
            try:
                step = functools.partial(
                    jax.jit(tile_calls.runner(self.place, tiles, features)), **arrays
                )
                errors = [
                    (float(accuracy.error(got, exact)), accuracy.limit(plain, self.shape.dtype))
                    for got, (exact, plain) in zip(step(), wanted, strict=True)
                ]
                error, allowed = max(errors, key=lambda pair: pair[0] / pair[1])
                one = Measured(self.place, tiles, error=error, allowed=allowed)
                if error > allowed:
                    yield dataclasses.replace(one, reason=f"wrong: error {error:.2g}")
                    continue

                def blocking(step=step):
                    jax.block_until_ready(step())

                timers[tiles], note = rounds.timer(blocking, platform, kernels="axattn_")
                found[tiles] = dataclasses.replace(one, note=note)
            except Exception as failure:  # whatever one candidate does, the others are still there
                reason = f"{type(failure).__name__}: {' '.join(str(failure).split())}"
                yield Measured(self.place, tiles, reason=reason)
                processes.probe()
        samples: dict[Any, list[float]] = {tiles: [] for tiles in timers}
        for tiles, seconds in rounds.samples(timers, seconds=self.seconds):
            samples[tiles].append(seconds)
        for tiles, times in samples.items():
            yield dataclasses.replace(found[tiles], seconds=statistics.median(times))


def tried(worker: processes.Worker, job: Measure, silence: float) -> list[Measured]:
    """All candidates of a row, whatever becomes of the worker's process.

    One that dies or hangs (see `processes.Worker.run`) costs the candidate that it was at; those
    that were not yet timed are begun again in another process.
    """
    found: list[Measured] = []
    while job.candidates:
        doing, before = None, len(found)
        try:
            for message in worker.run(job, silence):
                if isinstance(message, Doing):
                    doing = message.tiles
                else:
                    found.append(message)
            break
        except RuntimeError as error:  # also a process that died or hung
            why = str(error).strip().splitlines()[-1]
        done = {one.tiles for one in found}
        left = tuple(tiles for tiles in job.candidates if tiles not in done)
        if doing in left:
            found.append(Measured(job.place, doing, reason=why))
            left = tuple(tiles for tiles in left if tiles != doing)
        elif len(found) == before:  # nothing to blame and nothing done: there is no way on
            return found + [Measured(job.place, tiles, reason=why) for tiles in left]
        job = dataclasses.replace(job, candidates=left)
    return found


_RESULTS = {"forward": ("out",), "query_grad": ("query",), "key_grad": ("key", "value")}


def flops(place: Place, shape: Shape) -> float:
    """Of the matrix products over the pairs that the mask allows."""
    head, value_head = place.head_dim, place.value_head_dim
    products = {
        "forward": head + value_head,
        "query_grad": 2 * head + value_head,
        "key_grad": 2 * (head + value_head),
    }
    length = shape.length
    pairs = length * length if place.kind == "full" else length * (length + 1) // 2
    return 2.0 * products[place.kernel] * pairs * shape.batch * shape.heads


@functools.lru_cache(maxsize=1)
def _problem(kind: str, head_dim: int, value_head_dim: int, shape: Shape):
    """Inputs by name, and (reference, error of plain attention) for each result by name.

    The three kernels of a kind and size share them.
    """
    place = Place("query_grad", kind, head_dim, value_head_dim)
    features = tile_calls.TYPICAL[kind]
    arrays = inputs.normal_on_device(tile_calls.inputs(place, shape, features))
    exact = {
        name: array.astype(jnp.float32) if array.dtype == shape.dtype else array
        for name, array in arrays.items()
    }
    given = ("query", "key", "value")

    @functools.partial(jax.jit, static_argnames="precision")
    def solve(arrays, precision):
        rest = {k: v for k, v in arrays.items() if k not in given}

        def attend(query, key, value):
            primal = {**rest, "query": query, "key": key, "value": value}
            return tile_calls.attend(
                primal,
                features,
                implementation="xla_chunked",
                return_residual=True,
                precision=precision,
            )

        (out, lse), vjp = jax.vjp(attend, *(arrays[name] for name in given))
        gradients = vjp((arrays["dout"].astype(out.dtype), jnp.zeros_like(lse)))
        return {"out": out, **dict(zip(given, gradients, strict=True))}, lse

    results, lse = solve(exact, "highest")
    plain, _ = solve(arrays, None)
    delta = (exact["dout"] * results["out"]).sum(-1)
    arrays = {**arrays, "lse": lse, "delta": delta}
    return arrays, {
        name: (results[name], float(accuracy.error(plain[name], results[name]))) for name in results
    }
