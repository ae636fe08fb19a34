from __future__ import annotations

import contextlib
import dataclasses
import importlib.util

import jax
import numpy as np
import pytest

import axattn
from benchmarks.harness import functions, inputs, torch_peer

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed (extra peers)"
)


@pytest.fixture(scope="module")
def peer():
    with contextlib.closing(torch_peer.TorchPeer()) as peer:
        yield peer


def make_problem(dtype, direction, is_causal=True):
    args = inputs.attention_inputs(2, 9 if is_causal else 1, 9, 4, 2, 8, dtype)
    causal = {"is_causal": is_causal}
    attend = jax.tree_util.Partial(axattn.dot_product_attention, **causal)
    result = functions.in_direction(attend, direction)(*args)
    return torch_peer.Problem.from_result(args, result, direction=direction, **causal)


@needs_torch
@pytest.mark.ci
@pytest.mark.parametrize(
    "dtype, direction, is_causal",
    [("float32", "fwd+bwd", True), ("bfloat16", "fwd", True), ("float16", "fwd", False)],
)
def test_it_computes_what_axattn_computes(peer, dtype, direction, is_causal):
    problem = make_problem(dtype, direction, is_causal)
    assert len(problem.expected) == (1 if direction == "fwd" else 4)
    peer.prepare(problem)
    assert peer(2, 3) > 0


@needs_torch
@pytest.mark.ci
def test_another_result_is_an_error(peer):
    problem = make_problem("float32", "fwd+bwd")
    *right, dvalue = problem.expected
    with pytest.raises(RuntimeError, match="result 3 of 4 differs from axattn's"):
        peer.prepare(dataclasses.replace(problem, expected=(*right, 1.1 * dvalue)))


class Tensor(np.ndarray):
    """As much of torch's as `check` asks for."""

    def float(self):
        return self.astype(np.float32)

    def transpose(self, one, other):
        return self.swapaxes(one, other)

    def numpy(self):
        return np.asarray(self)


def test_results_that_differ_by_more_than_roundings_are_errors():
    problem = make_problem("bfloat16", "fwd")
    (expected,) = problem.expected
    tensor = expected.swapaxes(1, 2).view(Tensor)
    torch_peer.check([tensor * 1.02], problem)
    for wrong in (tensor * 1.05, tensor * np.nan):
        with pytest.raises(RuntimeError, match="result 0 of 1 differs"):
            torch_peer.check([wrong], problem)


def test_why_there_is_no_peer(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "is not installed (extra peers)" in torch_peer.find_refusal()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert torch_peer.find_refusal() is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "not on gpu" in torch_peer.find_refusal()
