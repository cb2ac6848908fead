"""What each step consumes; rules of ramps and mixes; the rate that follows the batch."""

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from stream_cases import plans

from jaxmoe import config as config_lib
from jaxmoe.config import (
    BatchStage,
    Config,
    DataConfig,
    LengthStage,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PhaseConfig,
    SourceConfig,
    TrainConfig,
    replace,
)
from jaxmoe.config_check import check
from jaxmoe.curriculum import Shape, Stretch, curriculum, shaped
from jaxmoe.errors import UserError
from jaxmoe.optim import batch_factors, rates, relative_path, schedule

RAMP = TrainConfig(
    steps=9,
    batch_size=4,
    seq_len=32,
    accumulate=2,
    batch_ramp=(BatchStage(tokens=300, batch_size=8, accumulate=4),),
    length_ramp=(LengthStage(tokens=0, seq_len=16), LengthStage(tokens=700, seq_len=32)),
)
MIX = (SourceConfig(name="code"), SourceConfig(name="text", epochs=2.0, fim_rate=0.5))


def config(train: TrainConfig = RAMP, **data: Any) -> Config:
    return Config(model=ModelConfig(loss_chunk=16), train=train, data=DataConfig(**data))


def test_stretches_by_hand():
    """128 tokens a step until 300 (3 steps: 384), then 256; sequences of 32 after 700."""
    plan = curriculum(config())
    assert plan.stretches == (
        Stretch(0, 3, 0, 0, Shape(8, 16, 2), 0),
        Stretch(3, 2, 384, 24, Shape(16, 16, 4), 0),
        Stretch(5, 4, 896, 56, Shape(8, 32, 4), 0),
    )
    assert plan.shapes == (Shape(8, 16, 2), Shape(16, 16, 4), Shape(8, 32, 4))
    assert (plan.steps, plan.largest) == (9, 256)
    tokens = [128, 256, 384, 640, 896, 1152, 1408, 1664, 1920]
    assert plan.by_step().tolist() == tokens
    assert [plan.tokens(step) for step in range(1, 10)] == tokens
    assert shaped(config(), plan.shapes[0]) == config()
    assert shaped(config(), plan.shapes[1]).train.accumulate == 4


@given(plans())
@settings(max_examples=80, deadline=None)
def test_sums_agree_with_a_run_step_by_step(plan: Any):
    """Each step's kind follows from the tokens before it alone, and back."""
    one, _ = plan
    found, tokens, sequences = curriculum(one), 0, 0
    for step in range(one.train.steps):
        stretch = found.at(step)
        assert (found.tokens(step), found.sequences(step)) == (tokens, sequences)
        assert found.step_of(tokens) == step
        batches = [s.batch_size for s in one.train.batch_ramp if s.tokens <= tokens]
        lengths = [s.seq_len for s in one.train.length_ramp if s.tokens <= tokens]
        batch, length = [one.train.batch_size, *batches][-1], [one.train.seq_len, *lengths][-1]
        assert stretch.shape.length == length
        assert stretch.shape.tokens == batch * one.train.seq_len
        assert stretch.phase == sum(phase.tokens <= tokens for phase in one.data.phases)
        tokens += stretch.shape.tokens
        sequences += stretch.shape.batch
        assert found.by_step()[step] == tokens
    assert found.steps == one.train.steps


def test_without_ramps_every_step_is_the_same():
    plain = config(TrainConfig(steps=5, batch_size=4, seq_len=32))
    (stretch,) = curriculum(plain).stretches
    assert stretch == Stretch(0, 5, 0, 0, Shape(4, 32, 1), 0)
    assert curriculum(plain).tokens(5) == 5 * plain.tokens_per_step


def test_tokens_between_steps_are_of_another_config():
    with pytest.raises(ValueError, match="100 tokens are no whole number"):
        curriculum(config()).step_of(100)


@pytest.mark.parametrize(("rule", "power"), [("none", 0), ("sqrt", 0.5), ("linear", 1)])
def test_the_rate_follows_the_batch(rule: Any, power: float):
    one = replace(config(), optim=OptimConfig(warmup_steps=2, batch_rule=rule))
    factors = np.array([0.5] * 3 + [1.0] * 6) ** power
    np.testing.assert_allclose(rates(one), relative_path(one.optim, 9) * factors, rtol=1e-6)
    jitted = schedule(one.optim, 9, batch_factors(one))
    np.testing.assert_allclose([jitted(s) for s in range(9)], rates(one) * one.optim.lr, rtol=1e-6)


def test_a_config_of_all_of_it_reads_back():
    phases = (PhaseConfig(tokens=5, weights=(("code", 0.5), ("text", 2.0))),)
    whole = config(sources=MIX, phases=phases, packing="best_fit", on_cap="redistribute")
    assert config_lib.from_json(config_lib.json.dumps(config_lib.as_dict(whole))) == whole
    assert hash(whole) != hash(config())
    sets = [
        "data.sources=[{'name': 'code'}, {'name': 'text', 'epochs': 2.0, 'fim_rate': 0.5}]",
        "data.phases=[{'tokens': 5, 'weights': [['code', 0.5], ['text', 2.0]]}]",
        "data.packing=best_fit",
        "data.on_cap=redistribute",
    ]
    assert config_lib.apply_sets(config(), sets) == whole
    with pytest.raises(UserError, match=r"unknown config key 'data\.sources\.0\.nam'"):
        config_lib.apply_sets(config(), ["data.sources=[{'nam': 'code'}]"])


def ramp(**changes: Any) -> Config:
    return config(replace(RAMP, **changes))


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (
            ramp(
                batch_ramp=(BatchStage(tokens=5, batch_size=8), BatchStage(tokens=5, batch_size=9))
            ),
            r"train.batch_ramp: its tokens are \[5, 5\]; each stage begins after the one before",
        ),
        (
            ramp(length_ramp=(LengthStage(tokens=9, seq_len=16), LengthStage(tokens=1, seq_len=8))),
            r"train.length_ramp: its tokens are \[9, 1\]",
        ),
        (
            ramp(length_ramp=(LengthStage(tokens=0, seq_len=48),)),
            r"4 sequences of train.seq_len=32 are 128 tokens, no whole number of sequences of 48",
        ),
        (
            ramp(batch_ramp=(BatchStage(tokens=5, batch_size=6, accumulate=4),), length_ramp=()),
            r"train.accumulate=4 does not divide train.batch_size=6",
        ),
        (
            ramp(length_ramp=(LengthStage(tokens=0, seq_len=8),)),
            r"model.loss_chunk=16 does not divide train.seq_len=8",
        ),
        (
            replace(ramp(), mesh=MeshConfig(context=16)),
            r"train.seq_len=16 does not divide into the 32 blocks of mesh.context=16",
        ),
        (
            replace(
                config(
                    replace(RAMP, seq_len=48, length_ramp=(LengthStage(tokens=0, seq_len=32),)),
                    packing="best_fit",
                )
            ),
            r"with data.packing=best_fit 32 must divide the longest sequence, 48",
        ),
        (config(sources=(*MIX, MIX[0])), r"data.sources: 'code' is there twice"),
        (
            config(sources=MIX, phases=(PhaseConfig(tokens=5, weights=(("prose", 1.0),)),)),
            r"data.phases\[0\]: 'prose' must be one of data.sources, once; these are 'code'",
        ),
        (
            config(phases=(PhaseConfig(tokens=5, weights=(("code", 1.0),)),)),
            r"must be one of data.sources, once; these are not given",
        ),
        (
            config(sources=MIX, phases=(PhaseConfig(tokens=5, weights=(("code", 0.0),)),)),
            r"data.phases\[0\]: no source has a weight above 0",
        ),
    ],
)
def test_what_ramps_and_mixes_refuse(one: Config, message: str):
    check(config(sources=MIX, packing="best_fit"))
    with pytest.raises(UserError) as caught:
        check(one)
    assert re.search(message, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)
