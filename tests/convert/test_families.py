"""config.json and ModelConfig say the same, both ways; what one cannot say is refused by name."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from folders import SMALL
from published import (
    DEEPSEEK_V3,
    GPT_OSS_20B,
    HUB,
    LLAMA_31_8B,
    MIXTRAL_8X7B,
    OLMOE_1B_7B,
    QWEN3_8B,
    QWEN3_30B_A3B,
    Json,
)

from jaxmoe import config as config_lib
from jaxmoe.config import Config, MlaConfig, ModelConfig, RopeConfig, RouterConfig, replace
from jaxmoe.convert import families
from jaxmoe.convert.links import links
from jaxmoe.errors import UserError
from jaxmoe.run.params import TRAINING_ONLY
from jaxmoe.transfer import tuned_at

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# True of the files, of training or of generation, and not of what a token's logits are.
SILENT = (
    *("initializer_range", "use_cache", "attention_dropout", "output_router_logits", "dtype"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "transformers_version"),
    *("auto_map", "ep_size", "quantization_config", "experts_per_token", "pretraining_tp"),
    *("initial_context_length", "max_position_embeddings", "max_window_layers"),
)


@pytest.mark.parametrize("name", HUB)
def test_a_published_config_comes_back(name: str) -> None:
    """Every entry of it that decides a logit, to the value."""
    hf, _, _ = HUB[name]
    family, cfg = families.from_hf(hf)
    again_family, again = families.to_hf(cfg)
    assert again_family is family
    scaling = again["rope_scaling"]
    for key, value in hf.items():
        if key in SILENT or (key, hf["model_type"]) == ("intermediate_size", "qwen3_moe"):
            continue  # no layer of Qwen3-30B-A3B has that width
        if key == "rope_scaling" and value is not None:
            for part, wanted in value.items():
                assert scaling["rope_type" if part == "type" else part] == wanted, part
        else:
            assert again.get(key) == value, key
    assert families.from_hf(again)[1] == cfg


@pytest.mark.parametrize("name", HUB)
def test_our_config_of_it_gives_the_same_logits(name: str) -> None:
    hf, file, _ = HUB[name]
    _, cfg = families.from_hf(hf)
    ours = config_lib.load(str(CONFIGS / file)).model
    different = [
        line
        for line in config_lib.diff(Config(model=cfg), Config(model=ours))
        if line.partition(":")[0].removeprefix("model.") not in TRAINING_ONLY
        and not (cfg.mla is not None and line.startswith("model.d_head:"))
    ]
    assert different == []


@pytest.mark.parametrize("name", HUB)
def test_links_have_the_published_number_of_parameters(name: str) -> None:
    hf, _, count = HUB[name]
    family, cfg = families.from_hf({**hf, "num_nextn_predict_layers": 0})
    found = links(cfg, family.layout)
    assert sum(math.prod(k.shape) for k in found) == count
    assert len({k.name for k in found}) == len(found)


# Of each model some tensors of the hub's index, theirs [out, in].
NAMES: dict[str, dict[str, tuple[int, ...]]] = {
    "Mixtral-8x7B-v0.1": {
        "lm_head.weight": (32000, 4096),
        "model.layers.31.self_attn.k_proj.weight": (1024, 4096),
        "model.layers.31.block_sparse_moe.gate.weight": (8, 4096),
        "model.layers.31.block_sparse_moe.experts.7.w1.weight": (14336, 4096),
        "model.layers.31.block_sparse_moe.experts.7.w2.weight": (4096, 14336),
    },
    "OLMoE-1B-7B-0924": {
        "model.layers.15.self_attn.q_norm.weight": (2048,),
        "model.layers.15.mlp.experts.63.down_proj.weight": (2048, 1024),
    },
    "Qwen3-30B-A3B": {
        "model.layers.47.self_attn.k_norm.weight": (128,),
        "model.layers.47.self_attn.o_proj.weight": (2048, 4096),
        "model.layers.47.mlp.gate.weight": (128, 2048),
        "model.layers.47.mlp.experts.127.up_proj.weight": (768, 2048),
    },
    "DeepSeek-V3": {
        "model.layers.2.mlp.gate_proj.weight": (18432, 7168),
        "model.layers.60.self_attn.q_a_proj.weight": (1536, 7168),
        "model.layers.60.self_attn.q_b_proj.weight": (24576, 1536),
        "model.layers.60.self_attn.kv_a_proj_with_mqa.weight": (576, 7168),
        "model.layers.60.self_attn.kv_b_proj.weight": (32768, 512),
        "model.layers.60.mlp.gate.e_score_correction_bias": (256,),
        "model.layers.60.mlp.shared_experts.down_proj.weight": (7168, 2048),
        "model.layers.61.eh_proj.weight": (7168, 14336),
        "model.layers.61.embed_tokens.weight": (129280, 7168),
        "model.layers.61.shared_head.head.weight": (129280, 7168),
        "model.layers.61.mlp.experts.255.gate_proj.weight": (2048, 7168),
    },
    "gpt-oss-20b": {
        "model.layers.23.self_attn.sinks": (64,),
        "model.layers.23.self_attn.o_proj.bias": (2880,),
        "model.layers.23.mlp.router.bias": (32,),
        "model.layers.23.mlp.experts.gate_up_proj": (32, 2880, 5760),
        "model.layers.23.mlp.experts.gate_up_proj_bias": (32, 5760),
        "model.layers.23.mlp.experts.down_proj_bias": (32, 2880),
    },
    "Llama-3.1-8B": {
        "model.embed_tokens.weight": (128256, 4096),
        "model.layers.31.mlp.down_proj.weight": (4096, 14336),
        "model.layers.31.post_attention_layernorm.weight": (4096,),
    },
    "Llama-3.2-1B": {"model.norm.weight": (2048,)},
    "Qwen3-8B": {"model.layers.35.self_attn.q_norm.weight": (128,)},
}


@pytest.mark.parametrize("name", HUB)
def test_published_names_and_shapes(name: str) -> None:
    family, cfg = families.from_hf(HUB[name][0])
    found = {k.name: k.shape for k in links(cfg, family.layout)}
    assert NAMES[name].items() <= found.items()
    assert ("lm_head.weight" in found) == (not cfg.tie_embeddings)


def without(hf: Json, *keys: str) -> Json:
    return {k: v for k, v in hf.items() if k not in keys}


@pytest.mark.parametrize(
    ("hf", "key", "default"),
    [
        (MIXTRAL_8X7B, "rms_norm_eps", 1e-5),
        (MIXTRAL_8X7B, "rope_theta", 1e6),
        (MIXTRAL_8X7B, "tie_word_embeddings", False),
        (MIXTRAL_8X7B, "sliding_window", None),
        (OLMOE_1B_7B, "rms_norm_eps", 1e-5),
        (OLMOE_1B_7B, "rope_theta", 1e4),
        (OLMOE_1B_7B, "norm_topk_prob", False),
        (OLMOE_1B_7B, "attention_bias", False),
        (OLMOE_1B_7B, "router_aux_loss_coef", 0.01),
        (QWEN3_30B_A3B, "rms_norm_eps", 1e-6),
        (QWEN3_30B_A3B, "norm_topk_prob", False),
        (QWEN3_30B_A3B, "decoder_sparse_step", 1),
        (QWEN3_30B_A3B, "mlp_only_layers", None),
        (QWEN3_30B_A3B, "use_sliding_window", False),
        (DEEPSEEK_V3, "q_lora_rank", 1536),
        (DEEPSEEK_V3, "n_group", 8),
        (DEEPSEEK_V3, "topk_group", 4),
        (DEEPSEEK_V3, "routed_scaling_factor", 2.5),
        (DEEPSEEK_V3, "norm_topk_prob", True),
        (DEEPSEEK_V3, "n_shared_experts", 1),
        (DEEPSEEK_V3, "num_nextn_predict_layers", 0),  # without the key nobody writes them
        (GPT_OSS_20B, "rms_norm_eps", 1e-5),
        (GPT_OSS_20B, "rope_theta", 150_000.0),
        (GPT_OSS_20B, "attention_bias", True),
        (GPT_OSS_20B, "sliding_window", 128),
        (GPT_OSS_20B, "head_dim", 64),
        (GPT_OSS_20B, "swiglu_limit", 7.0),
        (GPT_OSS_20B, "num_experts_per_tok", 4),
        (LLAMA_31_8B, "rms_norm_eps", 1e-6),
        (LLAMA_31_8B, "rope_theta", 1e4),
        (LLAMA_31_8B, "num_key_value_heads", 32),
        (LLAMA_31_8B, "head_dim", 128),
        (QWEN3_8B, "head_dim", 128),
        (QWEN3_8B, "rms_norm_eps", 1e-6),
        (QWEN3_8B, "attention_bias", False),
    ],
)
def test_an_absent_key_is_what_transformers_takes_for_it(hf: Json, key: str, default: Any) -> None:
    assert families.from_hf(without(hf, key))[1] == families.from_hf({**hf, key: default})[1]


def test_both_spellings_of_rope() -> None:
    """`rope_theta` and `rope_scaling` of transformers 4, `rope_parameters` of 5."""
    for hf in (DEEPSEEK_V3, GPT_OSS_20B, LLAMA_31_8B, QWEN3_8B):
        old = without(hf, "rope_theta", "rope_scaling")
        scaling = {"rope_type": "default", **(hf["rope_scaling"] or {})}
        scaling["rope_type"] = scaling.pop("type", scaling["rope_type"])
        new = {**old, "rope_parameters": {**scaling, "rope_theta": hf["rope_theta"]}}
        assert families.from_hf(new)[1] == families.from_hf(hf)[1]


def test_yarn_as_published() -> None:
    rope = families.from_hf(DEEPSEEK_V3)[1].rope
    assert rope == RopeConfig(
        theta=1e4,
        scaling="yarn",
        factor=40.0,
        original_length=4096,
        mscale=1.0,
        mscale_all_dim=1.0,
    )


ROPE = {"factor": 2.0, "original_max_position_embeddings": 16}
REFUSED: list[tuple[str, Json, tuple[str, ...]]] = [
    ("llama", {"model_type": "gemma2"}, ("model_type='gemma2'", "mixtral, olmoe")),
    ("llama", {"model_type": None}, ("model_type=None",)),
    ("llama", {"hidden_act": "gelu"}, ("hidden_act='gelu'", "'silu'")),
    ("llama", {"mlp_bias": True}, ("mlp_bias=True",)),
    ("llama", {"rope_scaling": {"type": "dynamic", **ROPE}}, ("rope_type='dynamic'",)),
    ("llama", {"rope_scaling": {"rope_type": "longrope", **ROPE}}, ("rope_type='longrope'",)),
    ("llama", {"rope_scaling": {"rope_type": "yarn"}}, ("'factor'",)),
    ("llama", {"partial_rotary_factor": 0.5}, ("partial_rotary_factor=0.5",)),
    (
        "qwen3",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
        ("partial_rotary_factor=0.25",),
    ),
    ("qwen3", {"use_sliding_window": True}, ("use_sliding_window=True",)),
    ("olmoe", {"clip_qkv": 8.0}, ("clip_qkv=8.0", "None")),
    ("qwen3_moe", {"mlp_only_layers": [1]}, ("mlp_only_layers=[1]",)),
    (
        "qwen3_moe",
        {"mlp_only_layers": [0], "decoder_sparse_step": 2},
        ("mlp_only_layers=[0]", "decoder_sparse_step=2"),
    ),
    ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}, ("mlp_only_layers=[0, 1, 2]",)),
    (
        "gpt_oss",
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        ("layer_types[0]", "full_attention"),
    ),
    (
        "gpt_oss",
        {"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
        ("layer_types[2]", "full_attention"),
    ),
    ("gpt_oss", {"layer_types": ["sliding_attention"]}, ("layer_types",)),
    ("deepseek_v3", {"rope_interleave": False}, ("rope_interleave=False",)),
    ("deepseek_v3", {"scoring_func": "softmax"}, ("scoring_func='softmax'",)),
    ("deepseek_v3", {"topk_method": "greedy"}, ("topk_method='greedy'",)),
    ("deepseek_v3", {"attention_bias": True}, ("attention_bias=True",)),
    ("deepseek_v3", {"moe_layer_freq": 2}, ("moe_layer_freq=2",)),
    ("mixtral", {"hidden_size": "wide"}, ("hidden_size='wide'",)),
    ("mixtral", {"num_attention_heads": 0}, ("num_attention_heads=0",)),
    ("mixtral", {"num_local_experts": "x"}, ("n_experts='x'",)),
]


@pytest.mark.parametrize(("name", "change", "words"), REFUSED, ids=lambda x: str(x)[:40])
def test_what_is_not_ours_is_refused(name: str, change: Json, words: tuple[str, ...]) -> None:
    """One line with the key and its value."""
    families.from_hf(SMALL[name])
    with pytest.raises(UserError) as error:
        families.from_hf({**SMALL[name], **change})
    text = str(error.value)
    assert all(word in text for word in words), text
    assert "\n" not in text


@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "num_experts_per_tok"])
def test_a_key_without_a_default_is_asked_for(key: str) -> None:
    with pytest.raises(UserError, match=f"it has no '{key}'"):
        families.from_hf(without(SMALL["mixtral"], key))


MOE = ModelConfig(router=RouterConfig(load_balance_coef=0.02))
DENSE = ModelConfig(n_experts=1, top_k=1)
MLA = MlaConfig(kv_rank=6, d_nope=4, d_rope=4, d_value=8)
SIGMOID = RouterConfig(score="sigmoid", balance_bias_rate=0.001, load_balance_coef=1e-4)
EXPORTED: list[tuple[str, ModelConfig]] = [
    ("qwen3_moe", MOE),
    ("qwen3_moe", replace(MOE, first_dense=2, d_ff_dense=64)),
    ("qwen3_moe", replace(MOE, first_dense=2)),  # dense layers as wide as an expert
    ("qwen3_moe", replace(MOE, moe_every=2, sliding_window=9)),
    ("olmoe", replace(MOE, qk_norm="full", attention_bias=True)),
    ("mixtral", replace(MOE, qk_norm="none", sliding_window=7)),
    ("qwen3", DENSE),
    ("qwen3", replace(DENSE, d_ff_dense=77, moe_every=3, first_dense=1)),
    ("llama", replace(DENSE, qk_norm="none", attention_bias=True)),
    ("deepseek_v3", replace(MOE, mla=MLA, qk_norm="none", n_kv_heads=4, router=SIGMOID)),
    ("deepseek_v3", replace(MOE, mla=MLA, qk_norm="none", n_kv_heads=4, router=SIGMOID, n_mtp=2)),
]


@pytest.mark.parametrize(("name", "cfg"), EXPORTED, ids=lambda x: str(x)[:12])
def test_ours_goes_out_and_comes_back(name: str, cfg: ModelConfig) -> None:
    family, hf = families.to_hf(cfg)
    assert family.model_type == hf["model_type"] == name
    back = families.from_hf(hf)[1]
    assert shapes(back) == shapes(cfg)


def shapes(cfg: ModelConfig) -> Any:
    """Names and shapes of all tensors, in order."""
    family, _ = families.to_hf(cfg)
    return [(k.name, k.shape) for k in links(cfg, family.layout)]


def test_what_is_ours_alone_may_have_any_value() -> None:
    router = replace(MOE.router, jitter=0.1, load_balance_scope="sequence", z_coef=0.5)
    own = replace(MOE, dtype="bfloat16", remat="none", loss_chunk=7, z_loss_coef=0.1, mtp_coef=0.1)
    assert families.to_hf(replace(own, router=router))[1] == families.to_hf(MOE)[1]


@pytest.mark.parametrize(
    ("cfg", "fields"),
    [
        (replace(MOE, logit_soft_cap=30.0), ["model.logit_soft_cap=30.0"]),
        (replace(MOE, transfer=tuned_at(MOE)), ["model.transfer"]),
        (replace(MOE, attention_soft_cap=50.0), ["model.attention_soft_cap=50.0"]),
        (replace(MOE, n_shared_experts=1), ["model.n_shared_experts=1"]),
        (replace(MOE, sliding_window=8, global_every=4), ["model.global_every=4"]),
        (replace(DENSE, sliding_window=8), ["model.sliding_window=8"]),
        (replace(MOE, router=replace(MOE.router, bias=True)), ["model.router.bias=True"]),
        (replace(MOE, router=replace(MOE.router, scale=2.0)), ["model.router.scale=2.0"]),
        (replace(MOE, activation="clamped_swiglu"), ["model.activation='clamped_swiglu'"]),
        (replace(MOE, expert_bias=True), ["model.expert_bias=True"]),
        (replace(MOE, n_mtp=1), ["model.n_mtp=1"]),
        (
            replace(MOE, router=replace(SIGMOID, n_groups=2), logit_soft_cap=5.0),
            [
                "model.router.score='sigmoid'",
                "model.router.n_groups=2",
                "model.router.balance_bias_rate=0.001",
                "model.logit_soft_cap=5.0",
            ],
        ),
        (
            replace(MOE, attention_sinks=True, qk_norm="none", tie_embeddings=True),
            ["model.router.bias=False", "model.expert_bias=False"],
        ),
    ],
    ids=lambda x: str(x)[:40],
)
def test_what_no_architecture_has_is_named(cfg: ModelConfig, fields: list[str]) -> None:
    with pytest.raises(UserError, match="no Hugging Face architecture has this model") as error:
        families.to_hf(cfg)
    assert all(field in str(error.value) for field in fields), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mla", [False, True])
def test_ntk_goes_out_as_a_theta(mla: bool) -> None:
    """theta * factor^(d / (d - 2)), d the rotary width."""
    base = EXPORTED[-2][1] if mla else replace(MOE, d_head=10)
    width = 4 if mla else 10
    cfg = replace(base, rope=RopeConfig(theta=500.0, scaling="ntk", factor=3.0))
    _, hf = families.to_hf(cfg)
    assert hf["rope_scaling"] is None
    assert hf["rope_theta"] == pytest.approx(500.0 * 3.0 ** (width / (width - 2)), rel=1e-12)


def test_no_field_of_a_model_is_forgotten() -> None:
    """A field that from_hf never sets must be refused by to_hf or be for training only; a new one
    in config.py fails here until families.py says what becomes of it."""
    known = {f.name for f in dataclasses.fields(ModelConfig)}
    read = set()
    for hf in SMALL.values():
        family, _ = families.from_hf(hf)
        read |= family.read(hf).keys()
    common = {"vocab_size", "d_model", "n_layers", "tie_embeddings", "norm_eps", "n_heads", "rope"}
    refused = {"attention_soft_cap", "logit_soft_cap", "transfer"}
    ours = {name for name in TRAINING_ONLY if "." not in name}
    assert known - read - common - refused - ours == set()
