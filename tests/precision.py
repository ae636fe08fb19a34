"""The rule for a right result: no more than twice the error of plain attention, and a few ulps.

Plain attention is what one writes without a library: K and V repeated to all heads, one softmax in
float32 over the whole T x S, matrix products of the inputs as they are. It and the implementations
run on the same inputs in the same precision; both are compared with float64 on the host
(the rule of FlashAttention's tests).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import axattn
from axattn import Mask
from tests import reference

ULPS = 2


def dropout_words(rng) -> np.ndarray:
    """What dropout draws from a user's key: the two words under which all scores are counted."""
    return np.asarray(jax.random.bits(jax.random.fold_in(rng, 0), (2,), jnp.uint32))


# As users have it; other programs of the tests are compiled in less time (tests/conftest.py).
optimized_jit = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 3,
        "xla_llvm_disable_expensive_passes": False,
    },
)


@dataclasses.dataclass(repr=False)
class Call:
    """One call: the differentiable inputs, the other arguments, and what the reference is given."""

    inputs: dict[str, jax.Array]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    reference_options: dict[str, Any] | None = None  # where they differ from the options
    poison: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # slots that are unused
    seed: int = 7

    @functools.cached_property
    def exact(self) -> reference.Reference:
        options = self.options if self.reference_options is None else self.reference_options
        options = {
            name: x for name, x in options.items() if name not in ("precision", "is_projected")
        }
        rng = options.pop("dropout_rng", None)
        if rng is not None:
            *lead, q_len, heads, _ = self.inputs["query"].shape
            options["kept"] = reference.kept(
                dropout_words(rng),
                lead,
                heads,
                q_len,
                self.inputs["key"].shape[-3],
                options["dropout_rate"],
                broadcast=options.pop("broadcast_dropout", False),
            )
        return reference.attend(**self.inputs, **options)

    @functools.cached_property
    def cotangents(self) -> tuple[jax.Array, jax.Array]:
        rng = np.random.default_rng(self.seed)
        query, value = self.inputs["query"], self.inputs["value"]
        shape = (*query.shape[:-1], value.shape[-1])
        dout = jnp.asarray(rng.normal(size=shape).astype(query.dtype))
        return dout, jnp.asarray(rng.normal(size=shape[:-1]).astype(jnp.float32))

    @functools.cached_property
    def exact_results(self) -> dict[str, np.ndarray]:
        gradients = self.exact.gradients(*self.cotangents)
        gradients = {name: gradients[name] for name in self.inputs}
        return {"out": self.exact.out, "lse": self.exact.lse, **gradients}

    @functools.cached_property
    def magnitudes(self) -> dict[str, np.ndarray]:
        """The size of the terms that each gradient sums."""
        return self.exact.gradients(*self.cotangents, of_magnitudes=True)

    @functools.cached_property
    def output_rounding(self) -> dict[str, np.ndarray]:
        """What rounding the output changes of each gradient at most, where they are found from it.

        Of flash attention: rowsum(dout * out) is what a row's scores are shifted by. An output that
        is exact, like that of a query with one key, allows nothing.
        """
        out, (dout, _) = self.exact.out, self.cotangents
        rounding = np.abs(out.astype(dout.dtype).astype(np.float64) - out)
        moved = (rounding * np.abs(reference.f64(dout))).sum(-1)
        return self.exact.gradients(np.zeros_like(out), moved, of_magnitudes=True)

    @functools.cached_property
    def score_rounding(self) -> np.ndarray:
        """What a few float32 ulps of its scores may change of each element of the output.

        Plain attention may round the one score luckily that a row hangs on, and twice luck is no
        bound for that row.
        """
        return ULPS * float(jnp.finfo(jnp.float32).eps) * self.exact.scores_in_out()

    def __repr__(self):
        shapes = {name: (x.shape, str(x.dtype)) for name, x in self.inputs.items()}
        return f"Call({shapes}, {self.options})"

    def _repr_pretty_(self, printer, cycle):  # what hypothesis prints
        printer.text(repr(self))

    def poisoned(self) -> dict[str, jax.Array]:
        """The inputs with NaN in the slots that must not be read."""
        return {
            name: np.where(self.poison[name][..., None, None], np.nan, x).astype(x.dtype)
            if name in self.poison
            else x
            for name, x in self.inputs.items()
        }


def results(call: Call, implementations, *, jit=jax.jit) -> dict[Any, dict[str, np.ndarray]]:
    """Output, LSE and all gradients of each implementation, from one program.

    An implementation is a name, or a function in the place of `axattn.dot_product_attention`.
    """
    return results_of_each([call], implementations, jit=jit)[0]


def results_of_each(calls, implementations, *, jit=jax.jit) -> list[dict]:
    """The same of calls that differ in the values of arrays only: one program serves them all."""

    def program(static, inputs, arrays, cotangents):
        def run(implementation):
            def attend(inputs):
                function = implementation
                if not callable(function):
                    function = functools.partial(
                        axattn.dot_product_attention, implementation=implementation
                    )
                return function(**inputs, **arrays, **dict(static), return_residual=True)

            (out, lse), pull = jax.vjp(attend, inputs)
            return {"out": out, "lse": lse, **pull(cotangents)[0]}

        return [run(implementation) for implementation in implementations]

    program = jit(program, static_argnums=0)
    found = []
    for call in calls:
        arrays = {
            k: v for k, v in call.options.items() if isinstance(v, (np.ndarray, jax.Array, Mask))
        }
        static = tuple((k, v) for k, v in call.options.items() if k not in arrays)
        of_call = jax.tree.map(
            np.asarray, program(static, call.poisoned(), arrays, call.cotangents)
        )
        found.append(dict(zip(implementations, of_call, strict=True)))
    assert program._cache_size() == 1
    return found


def plain_results(call: Call) -> dict[str, np.ndarray]:
    """The same results of plain attention. One program per shape: all options are whole arrays."""
    exact, heads = call.exact, call.inputs["query"].shape[-2]
    shape = exact.weights.shape
    options = call.options
    added = np.zeros(shape, np.float32)
    if options.get("alibi_slopes") is not None:
        positions = reference._positions(
            *shape[-2:], *(options.get(n) for n in ("q_offset", "q_positions", "kv_positions"))
        )
        distance = np.abs(positions[0][..., :, None] - positions[1][..., None, :])
        slopes = np.asarray(options["alibi_slopes"])[..., None, None]
        added = added - (slopes * distance[..., None, :, :]).astype(np.float32)
    if "bias" in call.inputs:
        added = added + np.asarray(call.inputs["bias"]).astype(np.float32)
    sinks = np.full(heads, -np.inf, np.float32)
    if "sinks" in call.inputs:
        sinks = np.asarray(call.inputs["sinks"]).astype(np.float32)
    found = _plain(
        {name: call.inputs[name] for name in ("query", "key", "value")},
        added,
        sinks,
        np.array(exact.allowed),
        np.broadcast_to(exact.inputs["kept"], shape).astype(np.float32),
        np.float32(exact.inputs["scale"]),
        call.cotangents,
        cap=exact.inputs["cap"],
    )
    found = jax.tree.map(np.asarray, found)
    for name in ("bias", "sinks"):
        gradient = found.pop(name)
        if name in call.inputs:
            array = call.inputs[name]
            gradient = reference._sum_to(gradient.astype(np.float64), array.shape)
            found[name] = gradient.astype(array.dtype)
    return found


@functools.partial(jax.jit, static_argnames="cap")
def _plain(inputs, bias, sinks, allowed, kept, scale, cotangents, *, cap):
    def attend(inputs, bias, sinks):
        query, key, value = (inputs[name] for name in ("query", "key", "value"))
        group = query.shape[-2] // key.shape[-2]
        key, value = (jnp.repeat(x, group, axis=-2) for x in (key, value))
        scores = scale * jnp.einsum(
            "...tnh,...snh->...nts", query, key, preferred_element_type=jnp.float32
        )
        if cap is not None:
            scores = cap * jnp.tanh(scores / cap)
        scores = jnp.where(allowed, scores + bias, -jnp.inf)
        sink = jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, sink], -1)
        empty = (scores == -jnp.inf).all(-1, keepdims=True)
        scores = jnp.where(empty, 0.0, scores)
        lse = jnp.where(empty[..., 0], -jnp.inf, jax.nn.logsumexp(scores, axis=-1))
        weights = jnp.where(empty, 0.0, jax.nn.softmax(scores, axis=-1))[..., :-1] * kept
        out = jnp.einsum(
            "...nts,...snh->...tnh",
            weights.astype(value.dtype),
            value,
            preferred_element_type=jnp.float32,
        )
        return out.astype(query.dtype), lse.swapaxes(-1, -2)

    (out, lse), pull = jax.vjp(attend, inputs, bias, sinks)
    gradients, dbias, dsinks = pull(cotangents)
    return {"out": out, "lse": lse, **gradients, "bias": dbias, "sinks": dsinks}


def assert_right(call: Call, found: dict, plain: dict, label: object = "") -> None:
    """Output, LSE and gradients obey the rule, and are finite where they should be."""
    exact = call.exact_results
    assert set(found) == set(exact)
    for name, want in exact.items():
        got, dtype = found[name], found[name].dtype
        where = f"{label} {name}"
        assert got.shape == want.shape, where
        assert dtype == plain[name].dtype, where
        got, baseline = got.astype(np.float64), plain[name].astype(np.float64)
        infinite = np.isneginf(want)
        np.testing.assert_array_equal(np.isneginf(got), infinite, err_msg=where)
        assert np.isfinite(got[~infinite]).all(), f"{where}: not finite"
        got, baseline, want = (np.where(infinite, 0.0, x) for x in (got, baseline, want))
        most = functools.partial(_most, name) if jnp.finfo(dtype).bits < 32 else np.max
        few = ULPS * float(jnp.finfo(dtype).eps) * most(np.abs(want))
        if name in call.inputs:
            # Weights are rounded to the dtype of the values that they multiply; nothing else is.
            eps = jnp.finfo(dtype if name == "value" else jnp.float32).eps
            few = few + ULPS * float(eps) * most(call.magnitudes[name])
            if label != "xla":  # which has no need of its output to find gradients
                few = few + ULPS * most(call.output_rounding[name])
        error, allowed = np.abs(got - want), 2 * most(np.abs(baseline - want)) + few
        allowed = np.broadcast_to(allowed, error.shape)
        if name == "out":
            allowed = allowed + call.score_rounding
        at = np.unravel_index(np.argmax(error - allowed), error.shape)
        assert error[at] <= allowed[at], (
            f"{where}: error {error[at]:.3g}, allowed {allowed[at]:.3g}"
        )
        size = np.sqrt(np.mean(want**2))
        if size > 0:
            error = _one_minus_cosine(got, want)
            allowed = 2 * _one_minus_cosine(baseline, want) + 0.5 * (np.max(few) / size) ** 2
            assert error <= allowed, f"{where}: 1 - cosine {error:.3g}, allowed {allowed:.3g}"


def _most(name: str, array: np.ndarray) -> np.ndarray:
    """The largest element of what is judged together: of 16-bit gradients, row by row.

    The first query of a causal call has a gradient of zero, whatever the others have. A row has all
    heads and features of a token, or all keys of a bias if these are many: of a few numbers plain
    attention may round all luckily, and twice luck is no bound.
    """
    rows = {"query": (-2, -1), "key": (-2, -1), "value": (-2, -1), "bias": (-2, -1)}
    if name == "bias" and array.shape[-1] >= 8:
        return array.max(-1, keepdims=True)
    return array.max(rows.get(name), keepdims=True)


def _one_minus_cosine(a, b):
    """Without cancellation: half the square of the distance of the unit vectors."""
    lengths = np.linalg.norm(a), np.linalg.norm(b)
    return 0.5 * np.linalg.norm(a / max(lengths[0], 1e-300) - b / lengths[1]) ** 2


def check(calls, implementations=("xla", "xla_chunked"), *, jit=jax.jit) -> None:
    """Every result obeys the rule: those of one call, or of some that differ in values only."""
    calls = [calls] if isinstance(calls, Call) else calls
    for call, found in zip(calls, results_of_each(calls, implementations, jit=jit), strict=True):
        plain = plain_results(call)
        for name in implementations:
            assert_right(call, found[name], plain, name)
