"""Small folders as the hub has them, random, written by the `safetensors` library."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
from published import HUB, Json

from jaxmoe.convert import families
from jaxmoe.convert.links import links

BF16 = np.dtype(ml_dtypes.bfloat16)
Tensors = dict[str, np.ndarray]

_SIZES: Json = {
    "hidden_size": 16,
    "intermediate_size": 10,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 22,
    "max_position_embeddings": 64,
}
_MLA: Json = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 6,
    "q_lora_rank": 7,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 4,
    "v_head_dim": 9,
    "moe_intermediate_size": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "quantization_config": None,
}
_OWN: dict[str, tuple[str, Json]] = {
    "mixtral": ("Mixtral-8x7B-v0.1", {"num_local_experts": 5, "head_dim": 6}),
    "olmoe": ("OLMoE-1B-7B-0924", {"num_experts": 5, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3-30B-A3B",
        {"moe_intermediate_size": 8, "num_experts": 5, "num_experts_per_tok": 2, "head_dim": 6},
    ),
    "deepseek_v3": ("DeepSeek-V3", _MLA),
    "gpt_oss": (
        "gpt-oss-20b",
        {
            "num_local_experts": 5,
            "head_dim": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "quantization_config": None,
        },
    ),
    "llama": ("Llama-3.2-1B", {"head_dim": 6}),
    "qwen3": ("Qwen3-8B", {"head_dim": 6}),
}
SMALL: dict[str, Json] = {k: {**HUB[hub][0], **_SIZES, **own} for k, (hub, own) in _OWN.items()}


def draw(hf: Json, dtype: np.dtype = BF16, copies: bool = False) -> Tensors:
    """A random tensor of every name and shape."""
    family, cfg = families.from_hf(hf)
    rng = np.random.default_rng(0)
    wanted = links(cfg, family.layout)
    return {k.name: rng.normal(size=k.shape).astype(dtype) for k in wanted if copies or not k.copy}


def write(folder: Path, hf: Json, tensors: Tensors) -> Path:
    """One file; returns the folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def read(folder: Path) -> Tensors:
    """Every tensor of every file, by the library."""
    found: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(safetensors.numpy.load_file(file))
    return found


def assert_same(got: Tensors, want: Tensors) -> None:
    """Names, dtypes and bits."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype, name
        assert got[name].shape == value.shape, name
        assert got[name].tobytes() == value.tobytes(), name


def quiet(*_: Any) -> None:
    """No progress."""
