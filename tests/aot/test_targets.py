"""The table of targets."""

from __future__ import annotations

import re

import pytest

from axattn import aot

NAMES = ("v4", "v5e", "v5p", "v6e", "tpu7x", "a100", "h100", "h200", "b200", "cpu")


def test_names():
    assert tuple(aot.TARGETS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_target_is_found_by_name_in_any_case_and_by_itself(name):
    chip = aot.target(name)
    assert chip.name == name
    assert aot.target(name.upper()) is chip
    assert aot.target(chip) is chip
    hash(chip)  # devices are cached per target


@pytest.mark.parametrize("name", ["v9", "", None, 5])
def test_an_unknown_target_is_refused_with_the_list(name):
    with pytest.raises(ValueError, match=r"target=.* is unknown.*v5p.*h200.*cpu"):
        aot.target(name)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "cpu"])
def test_figures_are_those_of_an_accelerator(name):
    chip = aot.target(name)
    assert 16 * 2**30 <= chip.hbm_bytes <= 300e9
    assert 1e14 < chip.peak_bf16_flops < 1e16
    assert 5e11 < chip.hbm_bandwidth < 1e13
    # Machine balance, in FLOP per byte: catches a factor of a thousand in either.
    assert 100 < chip.peak_bf16_flops / chip.hbm_bandwidth < 700


def test_the_cpu_claims_no_hbm():
    chip = aot.target("cpu")
    assert (chip.hbm_bytes, chip.peak_bf16_flops, chip.hbm_bandwidth) == (None, None, None)


@pytest.mark.parametrize("name", ["a100", "h100", "h200", "b200"])
def test_gpu_config(name):
    chip = aot.target(name)
    config = chip.config()
    assert config.count("{") == config.count("}")
    assert f'device_description_str: "{chip.description}"' in config
    assert f"device_memory_size: {chip.hbm_bytes}" in config
    assert re.search(r"core_count: \d+\n", config)
    features = "NONE" if name == "a100" else "ACCELERATED_FEATURES"
    assert f"feature_extension: {features}" in config


def test_only_gpus_have_a_gpu_config():
    with pytest.raises(ValueError, match="'v5p' is not a GPU"):
        aot.target("v5p").config()
