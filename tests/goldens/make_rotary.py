"""Writes rotary.npz: rotary embeddings as transformers computes them.

Run by hand, in an environment that has transformers and torch (not needed by the tests):

    pip install transformers torch numpy && python tests/goldens/make_rotary.py

Last run: transformers 5.23.0, torch 2.13.0+cpu, numpy 2.4.6 (the file holds these too).
Each case holds, in float32: ``<case>/frequencies`` [R/2], ``<case>/factor`` (on cosine and sine),
``<case>/x`` and ``<case>/out`` [B, T, N, H] and ``<case>/positions`` int32 [B, T]. The settings
of each case are in tests/test_rotary.py, under the same name.
"""

from __future__ import annotations

import pathlib

import numpy as np
import torch
import transformers
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.gpt_neox import modeling_gpt_neox as neox
from transformers.models.gptj import modeling_gptj as gptj
from transformers.models.llama import modeling_llama as llama

OUT = pathlib.Path(__file__).with_name("rotary.npz")
POSITIONS = torch.tensor([[0, 1, 900], [17, 4095, 3]])


def random(head_dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 1, head_dim, generator=generator)


def llama_config(head_dim: int, **rope) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=2**20,
        rope_parameters={"rope_type": "default", **rope},
    )


def split_half(head_dim: int, seed: int, **rope) -> dict:
    module = llama.LlamaRotaryEmbedding(llama_config(head_dim, **rope))
    x = random(head_dim, seed)
    cos, sin = module(x, POSITIONS)
    out, _ = llama.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
    return dict(frequencies=module.inv_freq, factor=module.attention_scaling, x=x, out=out)


def neox_partial(head_dim: int, share: float, seed: int, **rope) -> dict:
    config = transformers.GPTNeoXConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        rope_parameters={"rope_type": "default", "partial_rotary_factor": share, **rope},
    )
    module = neox.GPTNeoXRotaryEmbedding(config)
    x = random(head_dim, seed)
    cos, sin = module(x, POSITIONS)
    out, _ = neox.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
    return dict(frequencies=module.inv_freq, factor=1.0, x=x, out=out)


def gptj_partial(head_dim: int, rotary_dim: int, seed: int) -> dict:
    table = gptj.create_sinusoidal_positions(4096, rotary_dim)
    sin, cos = table[POSITIONS].chunk(2, dim=-1)
    x = random(head_dim, seed)
    rotated = gptj.apply_rotary_pos_emb(x[..., :rotary_dim], sin, cos)
    out = torch.cat([rotated, x[..., rotary_dim:]], dim=-1)
    frequencies = torch.atan2(
        *(t[1] for t in gptj.create_sinusoidal_positions(2, rotary_dim).chunk(2, -1))
    )
    return dict(frequencies=frequencies, factor=1.0, x=x, out=out)


def deepseek_halves(head_dim: int, seed: int, **rope) -> dict:
    module = deepseek.DeepseekV3RotaryEmbedding(llama_config(head_dim, **rope))
    x = random(head_dim, seed)
    cos, sin = module(x, POSITIONS)
    out, _ = deepseek.apply_rotary_pos_emb_interleave(x, x, cos, sin, unsqueeze_dim=2)
    scale = deepseek.yarn_apply_mscale({"rope_type": "default", **rope}, 192**-0.5)
    return dict(
        frequencies=module.inv_freq,
        factor=module.attention_scaling,
        x=x,
        out=out,
        softmax_scale_192=scale,
    )


def main() -> None:
    yarn = dict(rope_type="yarn", rope_theta=10000.0, original_max_position_embeddings=4096)
    cases = {
        "llama": split_half(32, 0, rope_theta=500000.0),
        "linear": split_half(32, 1, rope_type="linear", rope_theta=10000.0, factor=4.0),
        "llama3": split_half(
            128,
            2,
            rope_type="llama3",
            rope_theta=500000.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
        "yarn": split_half(128, 3, **yarn, factor=16.0),
        "yarn_gpt_oss": split_half(
            64,
            4,
            **{**yarn, "rope_theta": 150000.0},
            factor=32.0,
            beta_fast=32.0,
            beta_slow=1.0,
            truncate=False,
        ),
        "yarn_given_factor": split_half(32, 5, **yarn, factor=4.0, attention_factor=1.25),
        "neox": neox_partial(64, 0.25, 6, rope_theta=10000.0),
        "gptj": gptj_partial(32, 12, 7),
        "deepseek_v3": deepseek_halves(
            64, 8, **yarn, factor=40.0, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0
        ),
        "deepseek_mscales": deepseek_halves(
            64, 9, **yarn, factor=40.0, mscale=1.0, mscale_all_dim=0.707
        ),
    }
    arrays = {
        "versions": np.array(
            f"transformers {transformers.__version__}, torch {torch.__version__}, "
            f"numpy {np.__version__}"
        )
    }
    for case, values in cases.items():
        arrays[f"{case}/positions"] = POSITIONS.numpy().astype(np.int32)
        for name, value in values.items():
            arrays[f"{case}/{name}"] = np.asarray(value, np.float32)
    np.savez_compressed(OUT, **arrays)
    print(f"wrote {OUT}: {OUT.stat().st_size} bytes, {arrays['versions']}")


if __name__ == "__main__":
    main()
