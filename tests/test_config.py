"""Configs: strict on load, with errors that say the mend; the same text both ways; hashable."""

import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxmoe.config import (
    Config,
    DataConfig,
    EvalConfig,
    ForecastConfig,
    MeshConfig,
    MlaConfig,
    ModelConfig,
    OptimConfig,
    RopeConfig,
    RouterConfig,
    TrainConfig,
    TransferConfig,
    apply_sets,
    as_dict,
    counted,
    diff,
    fingerprint,
    from_json,
    load,
    replace,
)
from jaxmoe.config_check import check
from jaxmoe.errors import UserError

# Consistent, and no value a default: a field that is lost on the way shows.
MODEL = ModelConfig(
    vocab_size=264,
    d_model=20,
    n_layers=3,
    n_heads=12,
    n_kv_heads=6,
    d_head=10,
    d_ff=14,
    n_experts=9,
    top_k=4,
    tie_embeddings=True,
    norm_eps=1e-3,
    rope=RopeConfig(
        theta=500.0,
        scaling="yarn",
        factor=3.0,
        original_length=100,
        beta_fast=9.0,
        beta_slow=2.0,
        truncate=False,
        attention_factor=1.5,
        mscale=0.7,
        mscale_all_dim=0.6,
        low_freq_factor=1.1,
        high_freq_factor=3.9,
    ),
    qk_norm="full",
    attention_bias=True,
    attention_sinks=True,
    attention_soft_cap=30.0,
    sliding_window=5,
    global_every=2,
    attention_path="chunked",
    context_attention="ring",
    n_shared_experts=1,
    first_dense=1,
    moe_every=2,
    d_ff_dense=28,
    activation="clamped_swiglu",
    swiglu_limit=6.0,
    swiglu_alpha=1.5,
    expert_bias=True,
    expert_path="blocked",
    expert_exchange="all_gather",
    matmul="float8",
    router=RouterConfig(
        score="sigmoid",
        norm_top_k=False,
        scale=2.5,
        n_groups=3,
        top_k_groups=2,
        bias=True,
        jitter=0.25,
        load_balance_coef=0.5,
        load_balance_scope="sequence",
        balance_bias_rate=0.125,
        z_coef=0.25,
    ),
    logit_soft_cap=20.0,
    z_loss_coef=0.5,
    n_mtp=2,
    mtp_coef=0.25,
    dtype="bfloat16",
    remat="none",
    loss_chunk=8,
)
MLA = MlaConfig(q_rank=4, kv_rank=6, d_nope=10, d_rope=8, d_value=12)
CONFIG = Config(
    name="made up",
    seed=7,
    model=MODEL,
    data=DataConfig(path="a/b", holdout=("x", "y"), tokenizer="bytes", cache="c"),
    optim=OptimConfig(name="muon", lr=0.25, schedule="cosine", warmup_steps=0),
    train=TrainConfig(steps=33, batch_size=6, seq_len=24, log_every=2),
    eval=EvalConfig(every=3, batch_size=5),
    mesh=MeshConfig(replica=2, data=1, expert=3, model=2),
    forecast=ForecastConfig(first=9, every=6),
)


def with_model(**fields: Any) -> Config:
    return replace(CONFIG, model=replace(MODEL, **fields))


def with_router(**fields: Any) -> Config:
    return with_model(router=replace(MODEL.router, **fields))


def with_mla(mla: MlaConfig = MLA, **fields: Any) -> Config:
    plain = {"mla": mla, "qk_norm": "none", "attention_bias": False, "n_kv_heads": 12}
    return with_model(**{**plain, **fields})


def leaves(tree: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, *path, key)
        else:
            yield (*path, key), value


def test_json_round_trip() -> None:
    shape = TransferConfig(
        d_model=8, n_layers=1, n_heads=2, n_kv_heads=1, d_head=4, d_ff=16, mla=MLA
    )
    for config in (CONFIG, with_mla(), with_model(transfer=shape)):
        assert from_json(json.dumps(as_dict(config))) == config
    ours, default = (dict(leaves(as_dict(c)["model"])) for c in (CONFIG, Config()))
    same = {path for path, value in ours.items() if default[path] == value}
    assert same == {("mla",), ("transfer",)}, "a field that is lost on the way would not show"
    assert from_json("{}") == Config()
    assert from_json('{"model": {"top_k": 1}}').model == ModelConfig(top_k=1)
    assert CONFIG.tokens_per_step == 144


def test_hashable_and_frozen() -> None:
    again = from_json(json.dumps(as_dict(CONFIG)))
    assert hash(again) == hash(CONFIG) and len({again, CONFIG, Config()}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        CONFIG.seed = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        ModelConfig(64)  # type: ignore[call-arg]  # keyword-only


def test_fingerprint_depends_on_values_only() -> None:
    """Not on the order of keys, nor on the process; on every leaf."""

    def shuffled(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        keys = list(tree)
        random.Random(1).shuffle(keys)
        return {key: shuffled(tree[key]) for key in keys}

    assert fingerprint(from_json(json.dumps(shuffled(as_dict(CONFIG))))) == fingerprint(CONFIG)
    assert fingerprint(ForecastConfig(first=200, every=100)) == "f21a2a51b52f"

    def changed(node: Any, path: tuple[str, ...]) -> Any:
        part = changed(getattr(node, path[0]), path[1:]) if path[1:] else "another value"
        return replace(node, **{path[0]: part})

    paths = [path for path, _ in leaves(as_dict(with_mla()))]
    seen = {fingerprint(with_mla()), *(fingerprint(changed(with_mla(), path)) for path in paths)}
    assert len(seen) == 1 + len(paths) and len(paths) > 80


def test_replace_makes_a_variant_and_diff_names_it() -> None:
    variant = with_model(top_k=2, d_ff=99)
    assert CONFIG.model.top_k == 4 and variant.model.n_heads == 12
    assert diff(CONFIG, variant) == ["model.d_ff: 14 -> 99", "model.top_k: 4 -> 2"]
    assert diff(CONFIG, CONFIG) == []


def test_sets() -> None:
    sets = ["model.d_ff=77", "name=new name", "data.path=None", "optim.lr=1e-3"]
    sets += [
        "model.qk_norm=none",
        "model.rope.theta=7",
        "model.router.jitter=0.5",
        "model.mla=None",
    ]
    sets += ["train.log_every=9", "model.logit_soft_cap=null", "model.sliding_window=3"]
    sets += ["data.holdout=['p', 'q']", "data.cache=/a=b", "model.d_ff=78"]
    got = apply_sets(CONFIG, sets)
    assert (got.model.d_ff, got.name, got.data.path, got.optim.lr) == (78, "new name", None, 1e-3)
    assert (
        got.model.qk_norm == "none" and got.data.holdout == ("p", "q") and got.data.cache == "/a=b"
    )
    assert (got.model.rope.theta, got.model.router.jitter, got.model.mla) == (7, 0.5, None)
    assert (got.model.logit_soft_cap, got.model.sliding_window) == (None, 3)
    assert got.model.rope.factor == 3 and got.model.router.n_groups == 3  # their neighbours stay
    assert apply_sets(CONFIG, []) == CONFIG
    mla = apply_sets(Config(), ["model.mla={'kv_rank': 3, 'd_nope': 4, 'd_rope': 2, 'd_value': 5}"])
    assert mla.model.mla == MlaConfig(kv_rank=3, d_nope=4, d_rope=2, d_value=5)


@pytest.mark.parametrize(
    ("item", "parts"),
    [
        ("model.topk=2", ["unknown config key 'model.topk'", "did you mean 'top_k'"]),
        ("modle.top_k=2", ["'modle.top_k'", "did you mean 'model'"]),
        ("trian.steps=2", ["did you mean 'train'"]),
        ("model.top_k.x=2", ["unknown config key 'model.top_k.x'"]),
        ("steps", ["KEY=VALUE", "train.steps=100"]),
        ("model=3", ["model is a group", "d_model"]),
        ("model.top_k=many", ["model.top_k='many'", "integer"]),
        ("model.top_k=2.5", ["model.top_k=2.5", "integer"]),
        ("model.top_k=0", ["model.top_k=0", "greater than 0"]),
        ("optim.beta1=1.5", ["optim.beta1=1.5", "less than or equal to 1"]),
        ("optim.clip=0", ["optim.clip=0", "greater than 0"]),
        ("seed=-1", ["seed=-1"]),
        ("mesh.data=-2", ["mesh.data=-2"]),
        ("model.dtype=float16", ["model.dtype='float16'", "bfloat16"]),
        ("model.qk_norm=true", ["model.qk_norm=True", "per_head"]),
        ("model.rope.scaling=yran", ["model.rope.scaling='yran'", "yarn"]),
        ("model.rope.factor=0.5", ["model.rope.factor=0.5", "greater than or equal to 1"]),
        ("model.rope.thta=3", ["unknown config key 'model.rope.thta'", "did you mean 'theta'"]),
        ("model.rope=3", ["model.rope is a group", "theta"]),
        ("model.router.score=tanh", ["model.router.score='tanh'", "sigmoid"]),
        ("model.router.jitter=1.5", ["model.router.jitter=1.5", "less than or equal to 1"]),
        ("model.router.load_balance_scope=all", ["load_balance_scope='all'", "'microbatch'"]),
        ("model.router.balance_bias_rate=-1", ["balance_bias_rate=-1", "greater than or equal to"]),
        ("model.sliding_window=0", ["model.sliding_window=0", "greater than 0"]),
        ("model.logit_soft_cap=0", ["model.logit_soft_cap=0", "greater than 0"]),
        ("model.mla={'kv_rank': 3}", ["model.mla.d_nope"]),
        ("optim.name=sgd", ["optim.name='sgd'", "muon"]),
    ],
)
def test_a_bad_set_names_the_value_and_the_mend(item: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        apply_sets(CONFIG, [item])
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_json_key_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown config key 'model\.n_expert'.*'n_experts'"):
        from_json('{"model": {"n_expert": 3}}')
    with pytest.raises(UserError, match=r"'faults\.0\.stop'; did you mean 'step'"):
        from_json('{"faults": [{"kind": "kill", "stop": 3}]}')
    with pytest.raises(UserError, match=r"'model\.mla\.kv_rnk'; did you mean 'kv_rank'"):
        from_json('{"model": {"mla": {"kv_rnk": 3}}}')
    with pytest.raises(UserError, match=r"unknown config key 'optimizer'.*'optim'"):
        from_json('{"optimizer": {}}')
    with pytest.raises(UserError, match="model.top_k='2'"):  # strict: no string for a number
        from_json('{"model": {"top_k": "2"}}')


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (with_model(top_k=10), r"model\.top_k=10 is more than model\.n_experts=9"),
        (with_model(n_kv_heads=8), r"n_kv_heads=8 does not divide model\.n_heads=12"),
        (with_model(d_head=9), r"model\.d_head=9 must be even"),
        (with_model(loss_chunk=7), r"model\.loss_chunk=7 does not divide train\.seq_len=24"),
        (
            replace(CONFIG, mesh=MeshConfig(expert=2)),
            r"mesh\.expert=2 does not divide model\.n_experts=9",
        ),
        (with_model(d_ff=15), r"mesh\.model=2 does not divide model\.d_ff=15"),
        (with_model(vocab_size=265), r"mesh\.model=2 does not divide model\.vocab_size=265"),
        (with_model(n_kv_heads=3), r"mesh\.model=2 does not divide model\.n_kv_heads=3"),
        (
            with_model(n_kv_heads=1, n_heads=9),
            r"mesh\.model=2 does not divide model\.n_heads=9",
        ),
        (with_model(d_ff_dense=27), r"mesh\.model=2 does not divide model\.d_ff_dense=27"),
        # Attention
        (with_mla(replace(MLA, d_rope=7)), r"model\.mla\.d_rope=7 must be even"),
        (
            with_mla(n_kv_heads=6),
            r"n_kv_heads=6: with model\.mla every head .* model\.n_heads=12",
        ),
        (with_mla(qk_norm="full"), r"model\.qk_norm=full: with model\.mla it must be none"),
        (with_mla(attention_bias=True), r"attention_bias=True: with model\.mla it must be False"),
        (with_model(sliding_window=None), r"global_every=2 needs model\.sliding_window"),
        (
            with_model(rope=RopeConfig(factor=2.0)),
            r"model\.rope\.factor=2\.0 needs model\.rope\.scaling: .*llama3",
        ),
        (
            with_model(d_head=2, rope=RopeConfig(scaling="ntk", factor=2.0)),
            r"model\.rope\.scaling=ntk needs more than the 2 rotary dims",
        ),
        (
            with_model(rope=RopeConfig(scaling="llama3", factor=2.0, low_freq_factor=4.0)),
            r"model\.rope\.low_freq_factor=4\.0 must be less",
        ),
        (
            with_model(attention_path="cudnn"),
            r"attention_path=cudnn: cuDNN has no model\.attention_soft_cap; set it to auto",
        ),
        (
            with_model(attention_path="cudnn", attention_soft_cap=None, dtype="float32"),
            r"cuDNN computes in bfloat16, not in model\.dtype=float32",
        ),
        # Experts
        (with_model(first_dense=3), r"first_dense=3 leaves none of model\.n_layers=3 experts"),
        (with_model(moe_every=3), r"moe_every=3 is more than the layers after .* none has experts"),
        (with_router(n_groups=4), r"router\.n_groups=4 does not divide model\.n_experts=9"),
        (with_router(top_k_groups=4), r"router\.top_k_groups=4 is more than model\.router\.n_gr"),
        (with_router(n_groups=9), r"router\.n_groups=9 leaves 1 expert a group: it needs two"),
        (
            with_router(top_k_groups=1),
            r"model\.top_k=4 is more than the 3 experts of model\.router\.top_k_groups=1 groups",
        ),
        (replace(CONFIG, mesh=MeshConfig(rounds=2)), r"mesh\.rounds=2 needs a pipeline"),
        (
            replace(CONFIG, mesh=MeshConfig(stage=4, microbatches=6)),
            r"mesh\.stage=4 does not divide mesh\.microbatches=6",
        ),
        # Sequences of 24 tokens, and 8 of them at a time
        (
            replace(CONFIG, mesh=MeshConfig(context=8)),
            r"seq_len=24 does not divide into the 16 blocks of mesh\.context=8, two a device",
        ),
        (
            replace(CONFIG, mesh=MeshConfig(context=2)),
            r"loss_chunk=8 does not divide train\.seq_len / mesh\.context=12",
        ),
        (
            replace(with_model(attention_path="splash"), mesh=MeshConfig(context=3)),
            r"attention_path=splash: it knows whole sequences only, and mesh\.context shards them",
        ),
        (replace(CONFIG, mesh=MeshConfig(data=0)), r"mesh\.data=0"),
        (replace(CONFIG, forecast=ForecastConfig(first=9, every=4)), r"forecast\.every=4"),
        (replace(CONFIG, forecast=ForecastConfig(first=8, every=6)), r"forecast\.first=8"),
        (with_model(vocab_size=256), r"model\.vocab_size=256: bytes need at least 257"),
    ],
)
def test_rules_that_span_fields(config: Config, message: str) -> None:
    check(CONFIG)
    with pytest.raises(UserError, match=message) as caught:
        check(config)
    assert "\n" not in str(caught.value)


def test_what_the_rules_allow() -> None:
    """Each next to one that is refused above."""
    check(with_mla())
    check(with_model(n_kv_heads=1))  # multi-query: the one head is on every `model` shard
    check(with_model(attention_path="splash"))  # whether this is a TPU is not asked here
    plain = {"attention_soft_cap": None, "attention_sinks": False}
    check(with_model(attention_path="cudnn", **plain))
    check(replace(with_model(attention_path="chunked"), mesh=MeshConfig(context=3)))
    check(replace(with_model(loss_chunk=4), mesh=MeshConfig(context=2)))
    check(with_model(d_ff_dense=0))
    check(with_model(sliding_window=None, global_every=0))
    check(with_model(rope=RopeConfig(scaling="linear", factor=2.0)))
    check(with_model(first_dense=2, moe_every=1))
    check(with_model(n_experts=1, top_k=1, first_dense=3, router=RouterConfig()))  # dense
    check(with_router(n_groups=1, top_k_groups=1))


def test_load(tmp_path: Path) -> None:
    """FILE:FUNCTION, or the function that is named like the file; a parent of the same folder."""
    head = "from jaxmoe.config import Config, replace\n"
    (tmp_path / "parent_of_x.py").write_text(
        head + "def parent_of_x():\n    return Config(seed=5)\n"
    )
    file = tmp_path / "x.py"
    file.write_text(
        head
        + "import parent_of_x as p\n"
        + "def x():\n    return replace(p.parent_of_x(), name='x')\n"
        + "def other():\n    return replace(x(), seed=6)\n"
        + "def number():\n    return 3\n"
    )
    assert load(str(file)) == Config(seed=5, name="x")
    assert load(f"{file}:other").seed == 6
    for spec, message in (
        (f"{file}:othre", "no function 'othre'; did you mean 'other'"),
        (f"{file}:number", "returned int, not Config"),
        (str(tmp_path / "y.py"), "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            load(spec)
    file.write_text("1 / 0\n")
    with pytest.raises(UserError, match="ZeroDivisionError"):
        load(str(file))


def test_a_later_field_changes_no_fingerprint_until_it_says_something() -> None:
    """Registers and records hold fingerprints of before it was there: this one is of 2026-11-22."""
    registered = load(str(Path(__file__).parents[1] / "configs" / "ladder.py") + ":target_moe")
    assert fingerprint(registered) == "e6a24f74b5fe"
    guarded = replace(registered, guard=replace(registered.guard, bad_step="skip"))
    assert fingerprint(guarded) != fingerprint(registered)
    assert counted(guarded).keys() - counted(registered).keys() == {"guard"}
    assert as_dict(registered)["guard"]["bad_step"] == "stop"
