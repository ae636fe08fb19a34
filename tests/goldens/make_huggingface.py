"""Writes huggingface.npz: tiny random models of transformers, and what their attention layers do;
and huggingface_defaults.json: what transformers takes a configuration to be that says nothing.

    pip install torch transformers numpy
    python tests/goldens/make_huggingface.py

Each model runs as a whole, offline, in float32 on the CPU, with its own masks and rotary embedding;
hooks take what goes into each attention layer and what comes out. The archive holds, per model,
``name/config`` (config.json as bytes), the attention layers' tensors by their names in a checkpoint,
and ``name/inputs/i`` and ``name/outputs/i`` of each layer. `tests/test_huggingface.py` reads it.
"""

from __future__ import annotations

import json
import pathlib

import numpy as np
import torch
import transformers

BATCH, LENGTH = 2, 21
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
YARN = dict(
    rope_type="yarn",
    rope_theta=100.0,
    factor=8.0,
    beta_fast=32,
    beta_slow=1,
    mscale=0.8,
    mscale_all_dim=1.2,
    original_max_position_embeddings=16,
)
COMMON = dict(
    vocab_size=31,
    hidden_size=24,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    rms_norm_eps=1e-6,
)
LATENT = dict(
    COMMON,
    num_key_value_heads=4,
    kv_lora_rank=12,
    qk_nope_head_dim=8,
    qk_rope_head_dim=6,
    v_head_dim=10,
    first_k_dense_replace=2,
    n_routed_experts=4,
    num_experts_per_tok=2,
)
# For what came later: as small as still shows it.
SMALL = dict(COMMON, hidden_size=16, intermediate_size=8, num_hidden_layers=1, batch=1, length=13)
STEP = dict(LLAMA3, low_freq_factor=1.0, high_freq_factor=1.0)  # as in Llama 4
FLAT = dict(YARN, truncate=False, mscale=None, mscale_all_dim=None)  # as in gpt-oss
FALCON = dict(vocab_size=31, hidden_size=24, num_hidden_layers=1, num_attention_heads=4)

# What is particular of each: the head size is not E / N, windows are shorter than the sequence.
MODELS = {
    "llama": ("LlamaConfig", dict(COMMON, rope_parameters=LLAMA3)),
    "llama_bias": ("LlamaConfig", dict(COMMON, attention_bias=True, head_dim=10)),
    "mistral": ("MistralConfig", dict(COMMON, head_dim=8, sliding_window=7)),
    "gemma2": (
        "Gemma2Config",
        dict(
            COMMON,
            head_dim=8,
            sliding_window=7,
            query_pre_attn_scalar=11,
            attn_logit_softcapping=1.5,
        ),
    ),
    "gemma3": (
        "Gemma3TextConfig",
        dict(
            COMMON,
            head_dim=8,
            sliding_window=7,
            query_pre_attn_scalar=11,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters={
                "sliding_attention": dict(rope_type="default", rope_theta=50.0),
                "full_attention": dict(rope_type="linear", rope_theta=300.0, factor=8.0),
            },
        ),
    ),
    "qwen2": (
        "Qwen2Config",
        dict(COMMON, use_sliding_window=True, sliding_window=7, max_window_layers=1),
    ),
    "qwen3": ("Qwen3Config", dict(COMMON, head_dim=8)),
    "falcon_mqa": ("FalconConfig", FALCON),
    "falcon_gqa": ("FalconConfig", dict(FALCON, new_decoder_architecture=True, num_kv_heads=2)),
    "falcon_mha": ("FalconConfig", dict(FALCON, multi_query=False, bias=True)),
    "deepseek_v2": (
        "DeepseekV2Config",
        dict(LATENT, q_lora_rank=None, topk_method="greedy"),
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        dict(LATENT, q_lora_rank=16, rope_parameters=YARN, n_group=2, topk_group=1),
    ),
    "deepseek_v3_halves": (
        "DeepseekV3Config",
        dict(
            LATENT,
            q_lora_rank=16,
            rope_interleave=False,
            attention_bias=True,
            n_group=2,
            topk_group=1,
        ),
    ),
    "mixtral": ("MixtralConfig", dict(SMALL, head_dim=6, sliding_window=5, num_local_experts=2)),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        dict(
            SMALL,
            num_hidden_layers=2,
            use_sliding_window=True,
            sliding_window=5,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=8,
        ),
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        dict(
            SMALL,
            head_dim=6,
            attention_bias=True,
            use_sliding_window=True,
            sliding_window=5,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=8,
        ),
    ),
    "gemma": ("GemmaConfig", dict(SMALL, head_dim=6, num_key_value_heads=1)),
    "phi3": (
        "Phi3Config",
        dict(SMALL, hidden_size=24, partial_rotary_factor=0.7, sliding_window=5, pad_token_id=0),
    ),
    "gpt_oss": (
        "GptOssConfig",
        dict(
            SMALL,
            num_hidden_layers=2,
            head_dim=6,
            sliding_window=5,
            rope_parameters=FLAT,
            num_local_experts=2,
            num_experts_per_tok=1,
        ),
    ),
    "granite": ("GraniteConfig", dict(SMALL, attention_multiplier=0.8, attention_bias=True)),
    # Nothing normalizes its inputs, which are embeddings.
    "olmo2": ("Olmo2Config", dict(SMALL, initializer_range=1.0)),
    "smollm3": (
        "SmolLM3Config",
        dict(
            SMALL,
            num_hidden_layers=2,
            no_rope_layer_interval=2,
            use_sliding_window=True,
            sliding_window=5,
            pad_token_id=0,
        ),
    ),
    "glm4": ("Glm4Config", dict(SMALL, head_dim=8, pad_token_id=0)),
    "llama4": (
        "Llama4TextConfig",
        dict(
            SMALL,
            num_hidden_layers=2,
            head_dim=6,
            intermediate_size_mlp=8,
            no_rope_layer_interval=2,
            attention_chunk_size=128,
            rope_parameters=STEP,
            num_local_experts=2,
        ),
    ),
}


def attention_layers(model):
    """Name and module of each attention layer."""
    for name, module in model.named_modules():
        if name.endswith((".self_attn", ".self_attention")):
            yield name, module


def randomize(module, generator):
    """Weights that make attention uneven, and norms and biases that are not their first values."""
    for name, parameter in module.named_parameters():
        size = 0.5 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5 * 1.6
        values = torch.randn(parameter.shape, generator=generator) * size
        if parameter.ndim == 1 and "norm" in name:
            values = parameter.data + values
        parameter.data = values


@torch.no_grad()
def record(config_name, options, seed):
    options = dict(options)
    shape = options.pop("batch", BATCH), options.pop("length", LENGTH)
    config = getattr(transformers, config_name)(**options)
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager"
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    found, inputs, outputs = {}, {}, {}
    for name, module in attention_layers(model):
        randomize(module, generator)

        def before(module, args, kwargs, name=name):
            inputs[name] = (args[0] if args else kwargs["hidden_states"]).numpy().copy()

        def after(module, args, output, name=name):
            outputs[name] = output[0].numpy().copy()

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)
        for key, value in module.state_dict().items():
            found[f"{name}.{key}"] = value.numpy().copy()
    tokens = torch.randint(0, config.vocab_size, shape, generator=generator)
    whole = model(tokens, use_cache=False).logits
    stepped = step_by_step(model, tokens)
    assert torch.allclose(whole, stepped, atol=2e-4), (whole - stepped).abs().max()
    written = config.to_json_string(use_diff=False)
    found["config"] = np.frombuffer(json.dumps(json.loads(written)).encode(), np.uint8)
    model(tokens, use_cache=False)
    for i, name in enumerate(inputs):
        found[f"inputs/{i}"], found[f"outputs/{i}"] = inputs[name], outputs[name]
    return found


def step_by_step(model, tokens):
    """transformers' own decoding: what it does token by token is what it does at once."""
    past, logits = None, []
    for i in range(tokens.shape[1]):
        out = model(tokens[:, i : i + 1], past_key_values=past, use_cache=True)
        past = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1)


def defaults():
    """All fields of each family's configuration, by its model_type."""
    names = dict.fromkeys(config for config, _ in MODELS.values())
    return {
        config.model_type: json.loads(config.to_json_string(use_diff=False))
        for config in (getattr(transformers, name)() for name in names)
    }


def main():
    path = pathlib.Path(__file__).with_name("huggingface_defaults.json")
    path.write_text(json.dumps(defaults(), indent=1, sort_keys=True) + "\n")
    found = {}
    for seed, (name, (config, options)) in enumerate(MODELS.items()):
        for key, value in record(config, options, seed).items():
            found[f"{name}/{key}"] = value
        print(name, sum(x.nbytes for key, x in found.items() if key.startswith(f"{name}/")), "B")
    found["made_with"] = np.array(
        f"transformers {transformers.__version__}, torch {torch.__version__}"
    )
    path = pathlib.Path(__file__).with_name("huggingface.npz")
    np.savez_compressed(path, **found)
    print(path, path.stat().st_size, "B")


if __name__ == "__main__":
    main()
