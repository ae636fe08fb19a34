from __future__ import annotations

import itertools

import pytest

from benchmarks.harness import cases


def names(blocks):
    return [case.name for block in blocks for case in block.cases(["xla"])]


def test_axlearn_is_exactly_the_published_configurations():
    blocks = cases.select("axlearn", directions=["fwd"])
    assert names(blocks) == [f"MQABenchmark/{config}" for config in cases.AXLEARN]


def test_axlearn_decodes_against_a_32k_cache():
    (block,) = cases.select("axlearn", directions=["decode"])
    assert names([block]) == ["MQABenchmark/2048/16/2/32768"]
    assert block.batch == 8


def test_default_covers_directions_and_dtypes():
    all_cases = [c for b in cases.select("default") for c in b.cases(["xla"])]
    assert {c.direction for c in all_cases} == set(cases.DIRECTIONS)
    assert {c.dtype for c in all_cases} == {"float32", "bfloat16"}


def test_select_replaces_parts():
    (block,) = cases.select("axlearn", ["64/4/2/16"], 3, ["float16"], ["decode", "fwd"])
    assert block == cases.Block(("64/4/2/16",), 3, ("float16",), ("decode", "fwd"))


def test_select_takes_the_presets_directions_for_configs():
    (block,) = cases.select("axlearn", ["64/4/2/16"])
    assert block == cases.Block(("64/4/2/16",), 1, ("bfloat16",), cases.DIRECTIONS)


def test_implementations_of_one_question_follow_each_other():
    block = cases.Block(("64/4/2/16",), 1, ("float32",), ("fwd", "decode"))
    listed = [(c.direction, c.implementation) for c in block.cases(["repeat_kv", "xla"])]
    assert listed == list(itertools.product(["fwd", "decode"], ["repeat_kv", "xla"]))


def test_bad_configurations():
    wrong = {
        "takes model_dim/heads/kv_heads/seq_len": ["2048/16/2", "a/b/c/d", "-8/2/1/4"],
        "heads must divide model_dim": ["64/5/1/8"],
        "kv_heads must divide heads": ["64/4/3/8"],
        "seq_len must be at least 1": ["64/4/2/0"],
    }
    for message, texts in wrong.items():
        for text in texts:
            with pytest.raises(ValueError, match=message):
                cases.parse_config(text)


def test_bad_selections():
    for name, value in {"directions": ["up"], "dtypes": ["int8"], "batch": 0, "preset": ""}.items():
        with pytest.raises(ValueError, match=f"^--{name}"):
            cases.select(**{"preset": "default", name: value})
