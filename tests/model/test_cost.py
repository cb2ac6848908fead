"""The model's account of itself: counts, FLOPs, and a golden file of every parameter.

UPDATE_GOLDEN=1 python -m pytest tests/model/test_cost.py      writes tests/golden/*.txt anew
"""

import math
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from test_configs import FOUND

from jaxmoe import config as config_lib
from jaxmoe import spec as spec_lib
from jaxmoe import tree
from jaxmoe.config import MlaConfig, ModelConfig, RouterConfig, replace
from jaxmoe.config_check import check
from jaxmoe.model.cost import cost
from jaxmoe.model.lm import lm_specs

GOLDEN = Path(__file__).parents[1] / "golden"

SMALL = ModelConfig(
    vocab_size=100,
    d_model=10,
    n_layers=3,
    n_heads=6,
    n_kv_heads=2,
    d_head=4,
    d_ff=7,
    n_experts=5,
    top_k=2,
)

# Of one layer of SMALL.
QKVO = 10 * 24 + 2 * 10 * 8 + 24 * 10  # q, k and v, out
NORMS = 10 + 10 + 4 + 4
EXPERT = 3 * 10 * 7  # gate, up, down


def test_counted_by_hand() -> None:
    counted = cost(SMALL, seq_len=19)
    assert counted.groups == {
        "embed": 1000,  # 100 * 10
        "attention": 3 * (10 * 24 + 2 * 10 * 8 + 24 * 10),
        "dense": 0,
        "experts": 3 * 5 * 3 * 10 * 7,  # layers * experts * (gate, up, down)
        "shared": 0,
        "router": 3 * 10 * 5,
        "norm": 3 * (10 + 10 + 4 + 4) + 10,
        "mtp": 0,
        "head": 1000,
    }
    assert counted.params == counted.params_main == 1000 + 1920 + 3150 + 150 + 94 + 1000
    assert counted.params_active == 1920 + 3 * 2 * 3 * 70 + 150 + 94 + 1000
    # Per layer and head, two matmuls of 4 wide over a mean of (19 + 1) / 2 visible positions, two
    # FLOPs each, three passes.
    attention = 3 * 6 * 2 * 4 * 2 * 10 * 3
    assert counted.flops_per_token == 6 * counted.params_active + attention


def pairs(window: int = 19) -> int:
    """(i, j) of a sequence of 19 where i sees j, one by one."""
    return sum(1 for i in range(19) for j in range(19) if j <= i and i - j < window)


# By hand: config; groups that are not 0; what a token passes through; the MTP modules' own of that,
# with the head for each; products of attention for one sequence, forward, over all heads.
BY_HAND = {
    "tied": (
        replace(SMALL, tie_embeddings=True),
        {
            "embed": 1000,
            "attention": 3 * QKVO,
            "experts": 3 * 5 * EXPERT,
            "router": 150,
            "norm": 3 * NORMS + 10,
        },
        3 * QKVO + 3 * 2 * EXPERT + 150 + 3 * NORMS + 10 + 1000,
        0,
        3 * 6 * (4 + 4) * pairs(),
    ),
    "dense": (
        replace(SMALL, n_experts=1, top_k=1),
        {
            "embed": 1000,
            "attention": 3 * QKVO,
            "dense": 3 * EXPERT,
            "norm": 3 * NORMS + 10,
            "head": 1000,
        },
        3 * QKVO + 3 * EXPERT + 3 * NORMS + 10 + 1000,
        0,
        3 * 6 * (4 + 4) * pairs(),
    ),
    # Layers 0, 1 and 3 see five positions. Biases and sinks everywhere, and norms over all heads.
    "windowed": (
        replace(
            SMALL,
            n_layers=4,
            sliding_window=5,
            global_every=3,
            qk_norm="full",
            attention_bias=True,
            attention_sinks=True,
            expert_bias=True,
            router=RouterConfig(bias=True, balance_bias_rate=0.001),
        ),
        {
            "embed": 1000,
            "attention": 4 * (QKVO + 24 + 8 + 8 + 10 + 6),  # of q, k, v, out; sinks
            "experts": 4 * 5 * (EXPERT + 7 + 7 + 10),
            "router": 4 * (50 + 5 + 5),
            "norm": 4 * (10 + 10 + 24 + 8) + 10,
            "head": 1000,
        },
        4 * (QKVO + 56 + 2 * (EXPERT + 24) + 60 + 52) + 10 + 1000,
        0,
        6 * (4 + 4) * (3 * pairs(5) + pairs()),
    ),
    "mla": (
        replace(
            SMALL,
            n_kv_heads=6,
            qk_norm="none",
            mla=MlaConfig(q_rank=9, kv_rank=8, d_nope=5, d_rope=2, d_value=3),
        ),
        {
            "embed": 1000,
            # q's latent and its heads, the latent of k and v, the rotary key, k, v, out
            "attention": 3 * (10 * 9 + 9 * 42 + 10 * 8 + 10 * 2 + 8 * 30 + 8 * 18 + 18 * 10),
            "experts": 3 * 5 * EXPERT,
            "router": 150,
            "norm": 3 * (10 + 10 + 9 + 8) + 10,
            "head": 1000,
        },
        3 * 1132 + 3 * 2 * EXPERT + 150 + 3 * 37 + 10 + 1000,
        0,
        3 * 6 * ((5 + 2) + 3) * pairs(),
    ),
    "mla without a latent of queries": (
        replace(
            SMALL,
            n_kv_heads=6,
            qk_norm="none",
            mla=MlaConfig(kv_rank=8, d_nope=5, d_rope=2, d_value=3),
        ),
        {
            "embed": 1000,
            "attention": 3 * (10 * 42 + 10 * 8 + 10 * 2 + 8 * 30 + 8 * 18 + 18 * 10),
            "experts": 3 * 5 * EXPERT,
            "router": 150,
            "norm": 3 * (10 + 10 + 8) + 10,
            "head": 1000,
        },
        3 * 1084 + 3 * 2 * EXPERT + 150 + 3 * 28 + 10 + 1000,
        0,
        3 * 6 * ((5 + 2) + 3) * pairs(),
    ),
    # Layer 0 is dense and windowed, 1 sees all, 2 is windowed, 3 sees all; two modules, windowed.
    "shared, first dense, mtp": (
        replace(
            SMALL,
            n_layers=4,
            first_dense=1,
            d_ff_dense=11,
            n_shared_experts=2,
            n_mtp=2,
            sliding_window=6,
            global_every=2,
        ),
        {
            "embed": 1000,
            "attention": 4 * QKVO,
            "dense": 3 * 10 * 11,
            "experts": 3 * 5 * EXPERT,
            "shared": 3 * (3 * 10 * 14),
            "router": 150,
            "norm": 4 * NORMS + 10,
            # Three norms of its own, two projections, and a layer.
            "mtp": 2 * (30 + 2 * 100 + QKVO + NORMS + 50 + 5 * EXPERT + 420),
            "head": 1000,
        },
        4 * QKVO + 330 + 3 * 2 * EXPERT + 3 * 420 + 150 + 4 * NORMS + 10 + 1000,
        2 * (30 + 2 * 100 + QKVO + NORMS + 50 + 2 * EXPERT + 420 + 1000),
        6 * (4 + 4) * ((2 + 2) * pairs(6) + 2 * pairs()),
    ),
    # Dense by first_dense, dense, experts, dense, experts; a dense layer as wide as an expert.
    "every other": (
        replace(SMALL, n_layers=5, first_dense=1, moe_every=2),
        {
            "embed": 1000,
            "attention": 5 * QKVO,
            "dense": 3 * EXPERT,
            "experts": 2 * 5 * EXPERT,
            "router": 100,
            "norm": 5 * NORMS + 10,
            "head": 1000,
        },
        5 * QKVO + 3 * EXPERT + 2 * 2 * EXPERT + 100 + 5 * NORMS + 10 + 1000,
        0,
        5 * 6 * (4 + 4) * pairs(),
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_members_of_the_family_counted_by_hand(name: str) -> None:
    cfg, groups, active, of_mtp, products = BY_HAND[name]
    check(config_lib.Config(model=replace(cfg, loss_chunk=16)))
    counted = cost(cfg, seq_len=19)
    assert {group: n for group, n in counted.groups.items() if n} == groups
    assert counted.params == sum(groups.values())
    assert counted.params_main == counted.params - groups.get("mtp", 0)
    assert counted.params_active == active
    # 2 FLOPs a product, and the backward pass has two of them for each of the forward pass.
    assert counted.flops_per_sequence == 2 * 3 * (19 * (active + of_mtp) + products)
    assert counted.flops_per_token == counted.flops_per_sequence // 19


@pytest.mark.parametrize("name", BY_HAND)
def test_counts_are_of_real_arrays(name: str) -> None:
    cfg = BY_HAND[name][0]
    params = jax.eval_shape(lambda key: spec_lib.init(lm_specs(cfg), key), jax.random.key(0))
    sizes = sum(leaf.size for leaf in jax.tree.leaves(params))
    counted = cost(cfg, 19)
    assert sizes == counted.params == spec_lib.count(lm_specs(cfg)) == sum(counted.groups.values())


def test_counts_are_exact_integers() -> None:
    # Beyond float64 for one token, and no powers of two, which it would carry exactly.
    huge = replace(SMALL, vocab_size=3**12, d_model=3**11, d_ff=3**30, n_experts=3**7, n_mtp=1)
    counted = cost(replace(huge, sliding_window=3**12), 3**13)
    # And the run of 1e13 tokens is beyond int64.
    assert isinstance(counted.flops_per_token, int) and counted.flops_per_token * 10**13 > 2**63
    exact = counted.flops_per_sequence
    assert isinstance(exact, int) and 0 <= exact - counted.flops_per_token * 3**13 < 3**13


# Parameters and their published counts, in the last digit that is given (some sources cut instead
# of rounding).
PUBLISHED = [
    # Mistral AI, "Mixtral of experts", 11 December 2023; active with the embedding's rows.
    ("mixtral", "params", "46.7"),
    ("mixtral", "with_embed", "12.9"),
    # arXiv:2409.02060, table 1 (6.9 and 1.3), and the model card; likewise.
    ("olmoe", "params", "6.92"),
    ("olmoe", "with_embed", "1.28"),
    # The card of Qwen/Qwen3-30B-A3B: in all, without embedding and head, active.
    ("qwen3_moe", "params", "30.5"),
    ("qwen3_moe", "without_vocab", "29.9"),
    ("qwen3_moe", "with_embed", "3.3"),
    # README_WEIGHTS.md of deepseek-ai/DeepSeek-V3: active is with the head and without the
    # embedding; the module's own 11.5 are without the projection of 2 x 7168 x 7168 that the same
    # file lists, for 11.61 with it. README.md: 685 with copies of embedding and head in it.
    ("deepseek_v3", "params_main", "671"),
    ("deepseek_v3", "params_active", "36.6"),
    ("deepseek_v3", "mtp_less_projection", "11.5"),
    ("deepseek_v3", "with_mtp_copies", "685"),
    # arXiv:2508.10925, table 1: its MLP is experts and router; active is with the unembedding and
    # without the embedding.
    ("gpt_oss", "params", "20.91"),
    ("gpt_oss", "params_active", "3.61"),
    ("gpt_oss", "mlp", "19.12"),
    ("gpt_oss", "attention", "0.64"),
    ("gpt_oss", "vocab", "1.16"),
    ("gpt_oss_120b", "params", "116.83"),
    ("gpt_oss_120b", "params_active", "5.13"),
    ("gpt_oss_120b", "mlp", "114.71"),
    ("gpt_oss_120b", "attention", "0.96"),
    ("gpt_oss_120b", "vocab", "1.16"),
    # The cards of meta-llama/Llama-3.1-8B and Llama-3.2-1B.
    ("llama", "params", "8.03"),
    ("llama_1b", "params", "1.23"),
    # The cards of Qwen/Qwen3-8B and Qwen3-0.6B: in all, and without embedding and head.
    ("qwen3", "params", "8.2"),
    ("qwen3", "without_vocab", "6.95"),
    ("qwen3_06b", "params", "0.6"),
    ("qwen3_06b", "without_vocab", "0.44"),
]

# To the last one: the parameters of transformers 5.23's own module at the released configuration.
# Its DeepSeek-V3 is without MTP, and keeps the balance biases (58 x 256) as buffers.
TRANSFORMERS = {
    "mixtral": 46_702_792_704,
    "olmoe": 6_919_161_856,
    "qwen3_moe": 30_532_122_624,
    "deepseek_v3": 671_026_404_352 + 58 * 256,
    "gpt_oss": 20_914_757_184,
    "gpt_oss_120b": 116_829_156_672,
    "llama": 8_030_261_248,
    "llama_1b": 1_235_814_400,
    "qwen3": 8_190_735_360,
    "qwen3_06b": 596_049_920,
}


def named(name: str) -> config_lib.Config:
    (found,) = [found for found in FOUND if found.endswith(f":{name}")]
    return config_lib.load(found)


@pytest.mark.parametrize(("name", "what", "billions"), PUBLISHED)
def test_published_counts(name: str, what: str, billions: str) -> None:
    model = named(name).model
    counted = cost(model, 4096)
    groups = counted.groups
    counts = {
        **vars(counted),
        **groups,
        "with_embed": counted.params_active + groups["embed"],
        "vocab": groups["embed"] + groups["head"],
        "without_vocab": counted.params - groups["embed"] - groups["head"],
        "mlp": groups["experts"] + groups["router"],
        "mtp_less_projection": groups["mtp"] - 2 * model.d_model**2,
        "with_mtp_copies": counted.params + groups["embed"] + groups["head"],
    }
    digits = len(billions.partition(".")[2])
    assert abs(counts[what] / 1e9 - float(billions)) < 10**-digits


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_counts_of_another_library(name: str) -> None:
    assert cost(named(name).model, 4096).params_main == TRANSFORMERS[name]


def test_gpt4_has_the_reported_counts() -> None:
    """Sources in configs/gpt4.py. The counts come from Specs; the groups add up."""
    config = named("gpt4")
    counted = cost(config.model, config.train.seq_len)
    groups = counted.groups
    assert sum(groups.values()) == counted.params == spec_lib.count(lm_specs(config.model))
    assert groups["dense"] == groups["shared"] == groups["mtp"] == 0
    assert groups["experts"] / 16 == pytest.approx(111e9, rel=0.01)
    assert groups["attention"] == pytest.approx(55e9, rel=0.02)
    assert counted.params == pytest.approx(1.8e12, rel=0.02)
    assert counted.params_active == pytest.approx(280e9, rel=0.02)
    trained_on = config.train.steps * config.tokens_per_step
    assert trained_on == pytest.approx(13e12, rel=0.001)
    assert 6 * counted.params_active * trained_on == pytest.approx(2.15e25, rel=0.02)
    longer = named("gpt4_32k")
    assert cost(longer.model, 8192).params == counted.params


def of_name(cfg: ModelConfig) -> dict[str, spec_lib.Spec]:
    return dict(tree.named_leaves(lm_specs(cfg), is_leaf=spec_lib.is_spec))


WIDE = replace(SMALL, d_model=64, n_heads=8, d_head=16, d_ff=96)
WIDE_MLA = replace(
    WIDE,
    n_kv_heads=8,
    qk_norm="none",
    mla=MlaConfig(q_rank=48, kv_rank=40, d_nope=24, d_rope=16, d_value=20),
    attention_sinks=True,
    first_dense=1,
    d_ff_dense=80,
    n_shared_experts=2,
    expert_bias=True,
    router=RouterConfig(bias=True, balance_bias_rate=0.001),
    n_mtp=1,
    tie_embeddings=True,
)


@pytest.mark.parametrize("cfg", [WIDE, WIDE_MLA], ids=["grouped", "latent"])
def test_draws_have_the_declared_scale(cfg: ModelConfig) -> None:
    """std = gain / sqrt(fan_in); norms are ones, biases zeros; another name or seed draws anew."""
    specs = of_name(cfg)
    draw = jax.jit(lambda key: spec_lib.init(lm_specs(cfg), key))
    params = {n: np.asarray(a) for n, a in tree.named_leaves(draw(jax.random.key(0)))}
    other = {n: np.asarray(a) for n, a in tree.named_leaves(draw(jax.random.key(1)))}
    drawn = {n for n, spec in specs.items() if spec.init == "normal"}
    for name, leaf in params.items():
        spec = specs[name]
        if name in drawn:
            std = spec.gain / math.sqrt(spec.fan_in)
            assert abs(leaf.std() / std - 1) < 0.1 and abs(leaf.mean()) < 0.1 * std, name
            assert (leaf != other[name]).mean() > 0.99, name
        else:
            assert (leaf == {"ones": 1, "zeros": 0}[spec.init]).all(), name
    leaves = {n.rsplit("/", 1)[-1] for n in drawn}
    assert leaves and not any("norm" in n or "bias" in n or "sinks" in n for n in leaves)
    last = f"layers/{cfg.first_dense}/0/ffn/experts"
    gate, up = params[f"{last}/wgate_EDF"], params[f"{last}/wup_EDF"]
    assert gate.shape == up.shape and (gate != up).mean() > 0.99


def test_fan_ins() -> None:
    """What is added up in the forward pass; the two halves of an MTP module's input together."""
    fan_ins = {n: s.fan_in for n, s in of_name(WIDE).items()}
    assert fan_ins["embed_VD"] == 1 and fan_ins["head_DV"] == 64
    assert fan_ins["layers/0/0/attention/wk_DKH"] == 64
    assert fan_ins["layers/0/0/attention/wo_NHD"] == 8 * 16
    assert fan_ins["layers/0/0/ffn/experts/wdown_EFD"] == 96
    assert fan_ins["layers/0/0/ffn/router/w_DE"] == 64
    specs = of_name(WIDE_MLA)
    fan_ins = {n: s.fan_in for n, s in specs.items()}
    attention = "layers/0/0/attention"
    assert [fan_ins[f"{attention}/{w}"] for w in ("wqa_DQ", "wkva_DJ", "wkr_DW")] == [64] * 3
    assert [fan_ins[f"{attention}/{w}"] for w in ("wq_QNH", "wk_JNI", "wv_JNU")] == [48, 40, 40]
    assert fan_ins[f"{attention}/wo_NUD"] == 8 * 20
    assert fan_ins["layers/0/0/ffn/wgate_DF"] == 64 and fan_ins["layers/0/0/ffn/wdown_FD"] == 80
    assert fan_ins["layers/1/0/ffn/shared/wdown_FD"] == 2 * 96
    halves = [specs[f"mtp/0/{w}_DD"] for w in ("wembed", "whidden")]
    assert sum(s.gain**2 for s in halves) == pytest.approx(1)
    assert {s.fan_in for s in halves} == {64}
    # Multiplied by hidden states of unit variance, a tied embedding gives logits of unit variance.
    assert specs["embed_VD"].gain == 64**-0.5


def describe(config: config_lib.Config) -> str:
    specs = lm_specs(config.model)
    counted = cost(config.model, config.train.seq_len)
    lines = [f"{config.name}: parameters by name, shape, logical axes, size; then the counts"]
    for name, spec in tree.named_leaves(specs, is_leaf=spec_lib.is_spec):
        decay = "decays" if spec.is_matrix else "no decay"
        lines.append(f"{name}  {spec.shape}  {', '.join(spec.axes)}  {spec.size}  {decay}")
    lines += [f"{group} {n}" for group, n in counted.groups.items()]
    lines.append(f"params {counted.params}")
    lines.append(f"params_main {counted.params_main}")
    lines.append(f"params_active {counted.params_active}")
    lines.append(f"flops_per_token {counted.flops_per_token} at {config.train.seq_len} tokens")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("found", FOUND, ids=lambda found: found.rsplit(":", 1)[1])
def test_golden(found: str) -> None:
    """Names are checkpoint keys and sizes are promises: neither changes unseen."""
    config = config_lib.load(found)
    path, text = GOLDEN / f"{config.name}.txt", describe(config)
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.read_text() == text, (
        f"{path} differs; if that is meant, run UPDATE_GOLDEN=1 python -m pytest {__file__}"
    )


def test_goldens_are_those_of_the_configs() -> None:
    """No two configs of one name, and no file left of one that is gone."""
    names = [config_lib.load(found).name for found in FOUND]
    assert sorted(names) == sorted(path.stem for path in GOLDEN.glob("*.txt"))
    assert names == [found.rsplit(":", 1)[1] for found in FOUND]
