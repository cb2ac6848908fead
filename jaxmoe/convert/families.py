"""Which config.json of Hugging Face is which ModelConfig: one function each way per architecture.

What a config asks for and our model does not have is refused by name; what theirs cannot say (the
losses, noise, dtypes) is ours alone, and keeps its value.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from jaxmoe import config as config_lib
from jaxmoe.config import MlaConfig, ModelConfig, RopeConfig, RouterConfig
from jaxmoe.convert.links import Layout
from jaxmoe.errors import UserError
from jaxmoe.model.rope import ntk_theta
from jaxmoe.run.params import TRAINING_ONLY

Json = dict[str, Any]

OURS = [k for k in TRAINING_ONLY if "." not in k]
OURS_ROUTER = [k.removeprefix("router.") for k in TRAINING_ONLY if "." in k]


@dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture of theirs.

    Attributes:
        model_type, architecture: as in config.json.
        theta: of RoPE where config.json has none.
        read: the fields of a ModelConfig beyond what all have.
        write: entries of config.json beyond what all have.
        fixed: entries of config.json that must be as given here, where they are present.
        layout: how tensors are named and packed.
    """

    model_type: str
    architecture: str
    read: Callable[[Json], Json]
    write: Callable[[ModelConfig], Json]
    theta: float = 10_000.0
    fixed: Json = dataclasses.field(default_factory=dict)
    layout: Layout = dataclasses.field(default_factory=Layout)


def from_hf(hf: Json) -> tuple[Family, ModelConfig]:
    """Raises UserError for an architecture or a feature that is not ours."""
    family = next((f for f in FAMILIES if f.model_type == hf.get("model_type")), None)
    if family is None:
        known = ", ".join(f.model_type for f in FAMILIES)
        raise UserError(f"config.json: model_type={hf.get('model_type')!r} is none of {known}")
    for key, value in {"hidden_act": "silu", **family.fixed}.items():
        if hf.get(key, value) not in (value, None):
            raise UserError(
                f"config.json: {key}={hf[key]!r} is not supported for {family.model_type}; it"
                f" must be {value!r}"
            )
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        if type(hf.get(key, 1)) is not int or hf.get(key, 1) < 1:
            raise UserError(f"config.json: {key}={hf[key]!r} must be a positive integer")
    try:
        n_heads = hf["num_attention_heads"]
        common = {
            "vocab_size": hf["vocab_size"],
            "d_model": hf["hidden_size"],
            "n_layers": hf["num_hidden_layers"],
            "tie_embeddings": bool(hf.get("tie_word_embeddings", False)),
            "norm_eps": hf.get("rms_norm_eps", 1e-6),
            "n_heads": n_heads,
            "n_kv_heads": hf.get("num_key_value_heads") or n_heads,
            "d_head": hf.get("head_dim") or hf["hidden_size"] // n_heads,
            "rope": _read_rope(hf, family.theta),
        }
        values = {**common, **family.read(hf)}
    except KeyError as error:
        raise UserError(f"config.json: it has no {error.args[0]!r}") from None
    return family, config_lib.model_from_dict(
        dataclasses.asdict(ModelConfig(**values))  # checks the types of what was read
    )


def to_hf(cfg: ModelConfig) -> tuple[Family, Json]:
    """The architecture that says all of a config, and its config.json.

    Raises:
        UserError: there is none; the nearest one and the fields it cannot say are named.
    """
    cfg = _without_ntk(cfg)
    family = _nearest(cfg)
    hf = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_act": "silu",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "tie_word_embeddings": cfg.tie_embeddings,
        "rms_norm_eps": cfg.norm_eps,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads,
        "head_dim": cfg.d_head,
        **_write_rope(cfg.rope),
        **family.fixed,
        **family.write(cfg),
    }
    back = _structure(from_hf(hf)[1], cfg)
    lost = _differences(cfg, back)
    if lost:
        raise UserError(
            f"no Hugging Face architecture has this model; {family.model_type} is nearest, and"
            f" cannot say {', '.join(lost)}"
        )
    return family, hf


def _nearest(cfg: ModelConfig) -> Family:
    if cfg.mla is not None:
        name = "deepseek_v3"
    elif cfg.attention_sinks:
        name = "gpt_oss"
    elif cfg.is_dense:
        name = "llama" if cfg.qk_norm == "none" else "qwen3"
    else:
        name = {"none": "mixtral", "per_head": "qwen3_moe", "full": "olmoe"}[cfg.qk_norm]
    return next(f for f in FAMILIES if f.model_type == name)


def _structure(read: ModelConfig, ours: ModelConfig) -> ModelConfig:
    """What was read back, with the fields that are ours alone taken from `ours`."""
    router = replace(read.router, **{k: getattr(ours.router, k) for k in OURS_ROUTER})
    rate = ours.router.balance_bias_rate
    if router.balance_bias_rate is not None and rate is not None:
        router = replace(router, balance_bias_rate=rate)
    kept = {k: getattr(ours, k) for k in OURS}
    if ours.is_dense:  # without experts these say nothing
        router = ours.router
        kept |= {k: getattr(ours, k) for k in ("top_k", "first_dense", "moe_every")}
    if ours.activation == "swiglu":
        kept |= {k: getattr(ours, k) for k in ("swiglu_limit", "swiglu_alpha")}
    if ours.mla is not None:
        kept["d_head"] = ours.d_head
    return replace(read, router=router, **kept)


def _differences(ours: ModelConfig, read: ModelConfig) -> list[str]:
    a = config_lib.Config(model=ours)
    b = config_lib.Config(model=_same_dense_width(read, ours))
    return [line.partition(" -> ")[0].replace(": ", "=") for line in config_lib.diff(a, b)]


def _same_dense_width(read: ModelConfig, ours: ModelConfig) -> ModelConfig:
    """0 and d_ff are two ways to say the same; without experts, d_ff says nothing else."""
    same = (read.d_ff_dense or read.d_ff) == (ours.d_ff_dense or ours.d_ff)
    no_dense = ours.first_dense == 0 and ours.moe_every == 1 and not ours.is_dense
    if same and ours.is_dense:
        return replace(read, d_ff=ours.d_ff, d_ff_dense=ours.d_ff_dense)
    return replace(read, d_ff_dense=ours.d_ff_dense) if same or no_dense else read


# RoPE


def _read_rope(hf: Json, theta: float) -> RopeConfig:
    """From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    given = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    theta = float(given.get("rope_theta") or hf.get("rope_theta") or theta)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", "linear", "yarn", "llama3"):
        known = "default, linear, yarn or llama3"
        raise UserError(f"config.json: rope_type={kind!r} is not supported; it must be {known}")
    part = given.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if part not in (None, 1):
        raise UserError(f"config.json: partial_rotary_factor={part} is not supported; it must be 1")
    if kind == "default":
        return RopeConfig(theta=theta)
    original = given.get("original_max_position_embeddings") or hf.get("max_position_embeddings")
    values: Json = {"factor": float(given["factor"])}
    if original:
        values["original_length"] = int(original)
    names = SCALING[kind]
    values |= {k: given[k] for k in names if given.get(k) is not None}
    return RopeConfig(theta=theta, scaling=kind, **values)


# Fields of ours and entries of theirs that have the same name, by the scaling.
YARN = ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim")
SCALING = {"linear": (), "yarn": YARN, "llama3": ("low_freq_factor", "high_freq_factor")}


def _write_rope(rope: RopeConfig) -> Json:
    """Both spellings, for transformers 4 and 5."""
    if rope.scaling == "none":
        return {
            "rope_theta": rope.theta,
            "rope_scaling": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": rope.theta},
        }
    names = SCALING[rope.scaling]
    scaling = {
        "rope_type": rope.scaling,
        "factor": rope.factor,
        "original_max_position_embeddings": rope.original_length,
        **{k: getattr(rope, k) for k in names if getattr(rope, k) is not None},
    }
    return {
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "rope_parameters": {**scaling, "rope_theta": rope.theta},
    }


def _without_ntk(cfg: ModelConfig) -> ModelConfig:
    """NTK scaling is another theta (model/rope.py)."""
    if cfg.rope.scaling != "ntk":
        return cfg
    theta = ntk_theta(cfg.rope, cfg.rotary_width)
    return replace(cfg, rope=RopeConfig(theta=theta))


# Architectures


def _softmax(hf: Json, norm_top_k: bool, coef: float = 0.001) -> RouterConfig:
    return RouterConfig(
        norm_top_k=norm_top_k, load_balance_coef=hf.get("router_aux_loss_coef", coef), z_coef=0.0
    )


def _read_llama(hf: Json) -> Json:
    return {
        "n_experts": 1,
        "top_k": 1,
        "d_ff": hf["intermediate_size"],
        "qk_norm": "none",
        "attention_bias": bool(hf.get("attention_bias", False)),
    }


def _write_llama(cfg: ModelConfig) -> Json:
    width = cfg.d_ff_dense or cfg.d_ff
    return {"intermediate_size": width, "attention_bias": cfg.attention_bias}


def _read_qwen3(hf: Json) -> Json:
    return {
        **_read_llama(hf),
        "qk_norm": "per_head",
        "d_head": hf.get("head_dim") or 128,
    }


def _read_mixtral(hf: Json) -> Json:
    return {
        "qk_norm": "none",
        "norm_eps": hf.get("rms_norm_eps", 1e-5),
        "d_ff": hf["intermediate_size"],
        "n_experts": hf["num_local_experts"],
        "top_k": hf["num_experts_per_tok"],
        "sliding_window": hf.get("sliding_window"),
        "router": _softmax(hf, norm_top_k=True),
    }


def _write_mixtral(cfg: ModelConfig) -> Json:
    return {
        "intermediate_size": cfg.d_ff,
        "num_local_experts": cfg.n_experts,
        "num_experts_per_tok": cfg.top_k,
        "sliding_window": cfg.sliding_window,
        "router_aux_loss_coef": cfg.router.load_balance_coef,
    }


def _read_olmoe(hf: Json) -> Json:
    return {
        "qk_norm": "full",
        "norm_eps": hf.get("rms_norm_eps", 1e-5),
        "attention_bias": bool(hf.get("attention_bias", False)),
        "d_ff": hf["intermediate_size"],
        "n_experts": hf["num_experts"],
        "top_k": hf["num_experts_per_tok"],
        "router": _softmax(hf, bool(hf.get("norm_topk_prob", False)), coef=0.01),
    }


def _write_olmoe(cfg: ModelConfig) -> Json:
    return {
        "attention_bias": cfg.attention_bias,
        "intermediate_size": cfg.d_ff,
        "num_experts": cfg.n_experts,
        "num_experts_per_tok": cfg.top_k,
        "norm_topk_prob": cfg.router.norm_top_k,
        "router_aux_loss_coef": cfg.router.load_balance_coef,
    }


def _read_qwen3_moe(hf: Json) -> Json:
    n_layers, only = hf["num_hidden_layers"], list(hf.get("mlp_only_layers") or [])
    every = hf.get("decoder_sparse_step", 1)
    if only and (every != 1 or only != list(range(len(only))) or len(only) >= n_layers):
        raise UserError(
            f"config.json: mlp_only_layers={only} is not supported with"
            f" decoder_sparse_step={every}; it must be the first layers, and the step 1"
        )
    return {
        "qk_norm": "per_head",
        "attention_bias": bool(hf.get("attention_bias", False)),
        "sliding_window": hf.get("sliding_window") if hf.get("use_sliding_window") else None,
        "d_ff": hf["moe_intermediate_size"],
        "d_ff_dense": hf["intermediate_size"] if only or every > 1 else 0,
        "first_dense": len(only),
        "moe_every": every,
        "n_experts": hf.get("num_experts") or hf["num_local_experts"],
        "top_k": hf["num_experts_per_tok"],
        "router": _softmax(hf, bool(hf.get("norm_topk_prob", False))),
    }


def _write_qwen3_moe(cfg: ModelConfig) -> Json:
    return {
        "attention_bias": cfg.attention_bias,
        "use_sliding_window": cfg.sliding_window is not None,
        "sliding_window": cfg.sliding_window,
        "moe_intermediate_size": cfg.d_ff,
        "intermediate_size": cfg.d_ff_dense or cfg.d_ff,
        "mlp_only_layers": list(range(cfg.first_dense)),
        "decoder_sparse_step": cfg.moe_every,
        "num_experts": cfg.n_experts,
        "num_experts_per_tok": cfg.top_k,
        "norm_topk_prob": cfg.router.norm_top_k,
        "router_aux_loss_coef": cfg.router.load_balance_coef,
    }


def _read_deepseek_v3(hf: Json) -> Json:
    groups = hf.get("n_group", 8) or 1
    return {
        "qk_norm": "none",
        "n_kv_heads": hf["num_attention_heads"],
        "d_head": hf["qk_rope_head_dim"],  # not used; what transformers says
        "mla": MlaConfig(
            q_rank=hf.get("q_lora_rank", 1536) or 0,
            kv_rank=hf["kv_lora_rank"],
            d_nope=hf["qk_nope_head_dim"],
            d_rope=hf["qk_rope_head_dim"],
            d_value=hf["v_head_dim"],
        ),
        "d_ff": hf["moe_intermediate_size"],
        "d_ff_dense": hf["intermediate_size"] if hf["first_k_dense_replace"] else 0,
        "first_dense": hf["first_k_dense_replace"],
        "moe_every": hf.get("moe_layer_freq", 1),
        "n_experts": hf["n_routed_experts"],
        "top_k": hf["num_experts_per_tok"],
        "n_shared_experts": hf.get("n_shared_experts", 1) or 0,
        "n_mtp": hf.get("num_nextn_predict_layers") or 0,
        "router": RouterConfig(
            score="sigmoid",
            norm_top_k=bool(hf.get("norm_topk_prob", True)),
            scale=hf.get("routed_scaling_factor", 2.5),
            n_groups=groups,
            top_k_groups=hf.get("topk_group", 4 if groups > 1 else 1) or groups,
            load_balance_coef=0.0001,  # arXiv:2412.19437, section 4.2
            load_balance_scope="sequence",
            balance_bias_rate=0.001,
            z_coef=0.0,
        ),
    }


def _write_deepseek_v3(cfg: ModelConfig) -> Json:
    mla, r = cfg.mla, cfg.router
    assert mla is not None
    return {
        "head_dim": mla.d_rope,
        "q_lora_rank": mla.q_rank or None,
        "kv_lora_rank": mla.kv_rank,
        "qk_nope_head_dim": mla.d_nope,
        "qk_rope_head_dim": mla.d_rope,
        "v_head_dim": mla.d_value,
        "moe_intermediate_size": cfg.d_ff,
        "intermediate_size": cfg.d_ff_dense or cfg.d_ff,
        "first_k_dense_replace": cfg.first_dense,
        "moe_layer_freq": 1,
        "n_routed_experts": cfg.n_experts,
        "num_experts_per_tok": cfg.top_k,
        "n_shared_experts": cfg.n_shared_experts,
        "num_nextn_predict_layers": cfg.n_mtp,
        "norm_topk_prob": r.norm_top_k,
        "routed_scaling_factor": r.scale,
        "n_group": r.n_groups,
        "topk_group": r.top_k_groups,
    }


def _read_gpt_oss(hf: Json) -> Json:
    n, window = hf["num_hidden_layers"], hf.get("sliding_window", 128)
    types = hf.get("layer_types")
    alternating = ["full_attention" if i % 2 else "sliding_attention" for i in range(n)]
    if types not in (None, alternating, ["sliding_attention"] * n):
        odd = next(
            (i for i, t in enumerate(types) if types[i : i + 1] != alternating[i : i + 1]), n
        )
        raise UserError(
            f"config.json: layer_types[{odd}]={types[odd : odd + 1]} is not supported; they must"
            f" alternate over all {n} layers, sliding_attention first, or all be that"
        )
    return {
        "qk_norm": "none",
        "norm_eps": hf.get("rms_norm_eps", 1e-5),
        "attention_bias": bool(hf.get("attention_bias", True)),
        "attention_sinks": True,
        "sliding_window": window,
        "global_every": 2 if types in (None, alternating) else 0,
        "d_head": hf.get("head_dim") or 64,
        "d_ff": hf["intermediate_size"],
        "n_experts": hf["num_local_experts"],
        "top_k": hf.get("num_experts_per_tok", 4),
        "activation": "clamped_swiglu",
        "swiglu_limit": float(hf.get("swiglu_limit", 7.0)),
        "swiglu_alpha": float(hf.get("swiglu_alpha", 1.702)),
        "expert_bias": True,
        "router": replace(_softmax(hf, norm_top_k=True), bias=True),
    }


def _write_gpt_oss(cfg: ModelConfig) -> Json:
    pattern = ["sliding_attention"] * cfg.n_layers
    if cfg.global_every == 2:
        pattern[1::2] = ["full_attention"] * len(pattern[1::2])
    return {
        "attention_bias": cfg.attention_bias,
        "sliding_window": cfg.sliding_window,
        "layer_types": pattern,
        "intermediate_size": cfg.d_ff,
        "num_local_experts": cfg.n_experts,
        "num_experts_per_tok": cfg.top_k,
        "swiglu_limit": cfg.swiglu_limit,
        "swiglu_alpha": cfg.swiglu_alpha,
        "router_aux_loss_coef": cfg.router.load_balance_coef,
    }


FAMILIES = (
    Family(
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        read=_read_mixtral,
        write=_write_mixtral,
        theta=1e6,
        layout=Layout(moe="block_sparse_moe", experts=("w1", "w3", "w2")),
    ),
    Family(
        model_type="olmoe",
        architecture="OlmoeForCausalLM",
        read=_read_olmoe,
        write=_write_olmoe,
        fixed={"clip_qkv": None},
    ),
    Family(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        read=_read_qwen3_moe,
        write=_write_qwen3_moe,
    ),
    Family(
        model_type="deepseek_v3",
        architecture="DeepseekV3ForCausalLM",
        read=_read_deepseek_v3,
        write=_write_deepseek_v3,
        fixed={
            **{"rope_interleave": True, "attention_bias": False, "moe_layer_freq": 1},
            **{"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
        },
    ),
    Family(
        model_type="gpt_oss",
        architecture="GptOssForCausalLM",
        read=_read_gpt_oss,
        write=_write_gpt_oss,
        theta=150_000.0,
        layout=Layout(router="router", packed=True),
    ),
    Family(
        model_type="llama",
        architecture="LlamaForCausalLM",
        read=_read_llama,
        write=_write_llama,
        fixed={"mlp_bias": False},
    ),
    Family(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        read=_read_qwen3,
        write=_write_llama,
        fixed={"use_sliding_window": False},
    ),
)
