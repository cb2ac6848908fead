"""Configs: strict on load, with errors that say the mend; the same text both ways; hashable."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest

from jaxmoe.config import (
    Config,
    DataConfig,
    EvalConfig,
    ForecastConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    apply_sets,
    as_dict,
    check,
    diff,
    fingerprint,
    from_json,
    load,
    replace,
)
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
    rope_theta=500.0,
    qk_norm=False,
    dtype="bfloat16",
    remat="none",
    loss_chunk=8,
)
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


def test_json_round_trip() -> None:
    assert from_json(json.dumps(as_dict(CONFIG))) == CONFIG
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
    assert fingerprint(ForecastConfig(first=200, every=100)) == "be16ee768989"
    groups = [f.name for f in dataclasses.fields(Config) if f.name not in ("name", "seed")]
    leaves = [(group, leaf) for group in groups for leaf in as_dict(CONFIG)[group]]
    seen = {fingerprint(CONFIG), fingerprint(replace(CONFIG, seed=8))}
    for group, leaf in leaves:
        part: Any = getattr(CONFIG, group)
        other: Any = replace(part, **{leaf: "another value"})
        seen.add(fingerprint(replace(CONFIG, **{group: other})))
    assert len(seen) == 2 + len(leaves) and len(leaves) > 40


def test_replace_makes_a_variant_and_diff_names_it() -> None:
    variant = with_model(top_k=2, d_ff=99)
    assert CONFIG.model.top_k == 4 and variant.model.n_heads == 12
    assert diff(CONFIG, variant) == ["model.d_ff: 14 -> 99", "model.top_k: 4 -> 2"]
    assert diff(CONFIG, CONFIG) == []


def test_sets() -> None:
    sets = ["model.d_ff=77", "name=new name", "data.path=None", "optim.lr=1e-3"]
    sets += ["model.qk_norm=true", "data.holdout=['p', 'q']", "data.cache=/a=b", "model.d_ff=78"]
    got = apply_sets(CONFIG, sets)
    assert (got.model.d_ff, got.name, got.data.path, got.optim.lr) == (78, "new name", None, 1e-3)
    assert got.model.qk_norm is True and got.data.holdout == ("p", "q") and got.data.cache == "/a=b"
    assert apply_sets(CONFIG, []) == CONFIG


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
        (with_model(n_experts=8), r"mesh\.expert=3 does not divide model\.n_experts=8"),
        (with_model(d_ff=15), r"mesh\.model=2 does not divide model\.d_ff=15"),
        (with_model(vocab_size=265), r"mesh\.model=2 does not divide model\.vocab_size=265"),
        (with_model(n_kv_heads=3), r"mesh\.model=2 does not divide model\.n_kv_heads=3"),
        (
            with_model(n_kv_heads=1, n_heads=9),
            r"mesh\.model=2 does not divide model\.n_heads=9",
        ),
        (replace(CONFIG, mesh=MeshConfig(stage=2)), r"mesh\.stage=2.*not built yet"),
        (replace(CONFIG, mesh=MeshConfig(context=2)), r"mesh\.context=2.*not built yet"),
        (replace(CONFIG, mesh=MeshConfig(data=0)), r"mesh\.data=0"),
        (replace(CONFIG, forecast=ForecastConfig(first=9, every=4)), r"forecast\.every=4"),
        (replace(CONFIG, forecast=ForecastConfig(first=8, every=6)), r"forecast\.first=8"),
        (with_model(vocab_size=256), r"model\.vocab_size=256: bytes need at least 257"),
    ],
)
def test_rules_that_span_fields(config: Config, message: str) -> None:
    check(CONFIG)
    with pytest.raises(UserError, match=message):
        check(config)


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
