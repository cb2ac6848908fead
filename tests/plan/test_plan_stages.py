"""The plan of a run whose batch or sequences grow: every compiled shape, and sums over them."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from stream_cases import plans

from jaxmoe.config import (
    BatchStage,
    Config,
    LengthStage,
    ModelConfig,
    PhaseConfig,
    SourceConfig,
    TrainConfig,
    as_dict,
    replace,
)
from jaxmoe.curriculum import Shape, curriculum
from jaxmoe.errors import UserError
from jaxmoe.model.cost import cost
from jaxmoe.plan import __main__ as command
from jaxmoe.plan.answer import Answer, plan
from jaxmoe.plan.hardware import TABLE, Hardware
from jaxmoe.plan.search import search
from jaxmoe.plan.stages import Stage, mean_over, pinned, stages

# 128 tokens a step until 300 (3 steps: 384), then 256; sequences of 32 after 700 (5 steps: 896).
RAMP = TrainConfig(
    steps=9,
    batch_size=4,
    seq_len=32,
    accumulate=2,
    batch_ramp=(BatchStage(tokens=300, batch_size=8, accumulate=4),),
    length_ramp=(LengthStage(tokens=0, seq_len=16), LengthStage(tokens=700, seq_len=32)),
)
# Dense: traced several times faster than experts with their switch over kernels.
DENSE = ModelConfig(
    vocab_size=64,
    d_model=16,
    n_layers=2,
    n_heads=2,
    n_kv_heads=2,
    d_head=8,
    d_ff=32,
    n_experts=1,
    top_k=1,
    loss_chunk=16,
)
CONFIG = Config(model=DENSE, train=RAMP)
H100 = TABLE["h100"]


def test_stages_by_hand() -> None:
    first, second, third = Shape(8, 16, 2), Shape(16, 16, 4), Shape(8, 32, 4)
    assert stages(CONFIG) == (
        Stage(shape=first, step=0, start=0, tokens=384),
        Stage(shape=second, step=3, start=384, tokens=512),
        Stage(shape=third, step=5, start=896, tokens=1024),
    )
    assert [stage.tokens for stage in stages(CONFIG, 500)] == [384, 116]
    assert [stage.steps for stage in stages(CONFIG, 512)] == [3, 0.5]
    assert [stage.tokens for stage in stages(CONFIG, 384)] == [384]
    assert [stage.tokens for stage in stages(CONFIG, 10**15)] == [384, 512, 10**15 - 896]


def test_more_tokens_than_the_steps_of_the_config_reach_its_later_stages() -> None:
    short = replace(CONFIG, train=replace(RAMP, steps=1))
    assert [stage.tokens for stage in stages(short)] == [128]
    assert [stage.tokens for stage in stages(short, 2000)] == [384, 512, 1104]


def test_without_ramps_a_run_is_one_stage_of_the_config_itself() -> None:
    plain = replace(CONFIG, train=replace(RAMP, batch_ramp=(), length_ramp=()))
    phases = (PhaseConfig(tokens=300, weights=(("a", 1.0),)),)
    data = replace(plain.data, sources=(SourceConfig(name="a"),), phases=phases)
    for config in (plain, replace(plain, data=data)):
        (only,) = stages(config)
        assert only == Stage(shape=Shape(4, 32, 2), step=0, start=0, tokens=9 * 128)
        assert pinned(config, only.shape) is config
        answer = plan(config, 1, H100)
        assert answer.stages == () and "stages" not in answer.as_dict()


@settings(max_examples=60, deadline=None)
@given(plans())
def test_stages_are_the_whole_run(drawn: tuple[Config, Any]) -> None:
    config = drawn[0]
    found, whole = stages(config), curriculum(config)
    assert sum(stage.tokens for stage in found) == whole.tokens(whole.steps)
    assert sum(stage.steps for stage in found) == whole.steps
    assert all(a.shape != b.shape for a, b in zip(found, found[1:], strict=False))
    for stage in found:
        assert whole.at(stage.step).shape == stage.shape
        assert whole.tokens(stage.step) == stage.start
        one = pinned(config, stage.shape)
        assert curriculum(one).shapes == (stage.shape,)


@pytest.fixture(scope="module")
def answer() -> Answer:
    return plan(CONFIG, 2, H100, mfu=0.4, price=3.0)


def test_each_stage_is_what_a_run_of_its_shape_alone_is(answer: Answer) -> None:
    for stage, found in answer.stages:
        alone = plan(pinned(CONFIG, stage.shape), 2, H100, tokens=stage.tokens, mfu=0.4, price=3.0)
        for part in ("memory", "step", "flows", "counted", "run", "asked"):
            assert getattr(found, part) == getattr(alone, part), part


def test_the_largest_shape_decides_and_the_run_is_the_sum(answer: Answer) -> None:
    parts = answer.stages
    peaks = [found.memory.peak for _, found in parts]
    assert len(set(peaks)) == 3
    assert answer.memory.peak == max(peaks)
    assert answer.shape == parts[peaks.index(max(peaks))][0].shape
    took = sum(found.step.seconds * stage.steps for stage, found in parts)
    assert answer.run.days == pytest.approx(took / 86_400)
    assert answer.run.tokens == 1920
    flops = [cost(DENSE, length).flops_per_sequence for length in (16, 32)]
    # 3 steps of 8 and 2 of 16 sequences of 16, then 4 of 8 sequences of 32.
    assert answer.run.flops == 56 * flops[0] + 32 * flops[1]
    assert answer.run.flops_6nd == 6 * answer.counted.params_active * 1920
    assert answer.run.dollars == pytest.approx(took / 3600 * 2 * 3.0)
    assert answer.run.mfu == pytest.approx(answer.run.flops / (took * 2 * H100.bf16))
    assert answer.run.seconds_a_step == pytest.approx(took / 9)
    assert answer.run.tokens_a_second == pytest.approx(1920 / took)
    assert answer.run.kwh == pytest.approx(took * 2 * (H100.watts or 0) / 3.6e6)
    assert answer.asked is not None and answer.asked.mfu == pytest.approx(0.4)
    assert answer.asked.days == pytest.approx(answer.run.flops / (0.4 * 2 * H100.bf16) / 86_400)


@pytest.fixture
def said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """(exit code, output, errors) of the command on the ramp."""
    file = tmp_path / "ramp.py"
    text = json.dumps(as_dict(CONFIG))
    file.write_text(
        f"from jaxmoe.config import from_json\ndef ramp():\n    return from_json({text!r})\n"
    )

    def run(*args: str) -> tuple[int, str, str]:
        code = command.main(["--config", str(file), "--hardware", "h100", *args])
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


def test_the_page_has_a_line_a_stage(said: Any) -> None:
    code, page, _ = said("--devices", "2")
    lines = page.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("stages of the ramp"))
    table = [line.split() for line in lines[at + 2 : at + 5]]
    assert code == 0
    assert [row[:6] for row in table] == [
        ["0", "384", "8", "x", "16", "2"],
        ["3", "512", "16", "x", "16", "4"],
        ["5", "1024", "8", "x", "32", "4"],
    ]
    assert "needs the most memory" in lines[at + 5]
    assert all(len(line) <= command.WIDE for line in lines)


def test_json_has_every_stage(said: Any) -> None:
    code, text, _ = said("--devices", "2", "--json", "--tokens", "600", "--mfu", "0.5")
    found = json.loads(text)
    assert code == 0
    shapes = [(s["batch"], s["length"], s["accumulate"]) for s in found["stages"]]
    assert shapes == [(8, 16, 2), (16, 16, 4)]
    assert [(s["first_step"], s["steps"]) for s in found["stages"]] == [(0, 3), (3, 216 / 256)]
    assert [(s["tokens_before"], s["tokens"]) for s in found["stages"]] == [(0, 384), (384, 216)]
    for part in ("run", "run_at_given_mfu"):
        for key in ("days", "flops", "dollars", "tokens"):
            whole = sum(s[part][key] for s in found["stages"])
            assert found[part][key] == pytest.approx(whole), (part, key)
    assert found["memory"]["peak"] == max(s["memory"]["peak"] for s in found["stages"])
    assert [s["fits"] for s in found["stages"]] == [True, True]
    assert found["shape"] in [{"batch": b, "length": n, "accumulate": a} for b, n, a in shapes]


def test_a_run_fits_only_if_its_largest_shape_does(
    said: Any, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = sorted(found.memory.peak for _, found in answer.stages)
    between = Hardware(**{**vars(H100), "hbm": (peaks[-1] + peaks[-2]) / 2})
    monkeypatch.setitem(TABLE, "h100", between)
    code, text, _ = said("--devices", "2", "--json")
    fits = [s["fits"] for s in json.loads(text)["stages"]]
    assert code == 1 and sorted(fits) == [False, True, True]


def test_a_later_batch_that_does_not_divide_is_refused(said: Any) -> None:
    code, out, err = said("--devices", "2", "--set", ODD)
    assert code == 2 and out == ""
    assert "train.batch_size=5" in err and "data=2" in err
    code, out, _ = said("--devices", "2", "--set", ODD, "--search")
    assert code == 0 and "data=2" not in out and "model=2" in out


ODD = 'train.batch_ramp=[{"tokens": 700, "batch_size": 5}]'


def test_a_search_reckons_with_all_stages() -> None:
    (best,) = search(CONFIG, 2, H100, 0.6, traced=1).best
    assert [stage for stage, _ in best.stages] == list(stages(CONFIG))
    # By this candidates are ranked before any is traced: 3, 2 and 4 of 9 steps.
    took = dict(zip(curriculum(CONFIG).shapes, (6.0, 9.0, 3.0), strict=True))
    assert mean_over(stages(CONFIG), took) == pytest.approx((3 * 6 + 2 * 9 + 4 * 3) / 9)


def test_a_search_refuses_a_ramp_that_no_mesh_can_run() -> None:
    wrong = replace(RAMP, length_ramp=(LengthStage(tokens=0, seq_len=4096),))
    with pytest.raises(UserError, match="no whole number of sequences of 4096"):
        search(replace(CONFIG, train=wrong), 2, H100, 0.6)


def test_every_shape_is_compiled(said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Config] = []

    @dataclass(frozen=True)
    class Report:
        fits: bool

    def report(config: Config, target: str) -> Report:
        assert target == "h100:1x1"
        asked.append(config)
        return Report(fits=len(asked) != 2)

    monkeypatch.setattr(command.aot, "compile_report", report)
    code, text, _ = said("--compile", "h100:1x1", "--json")
    shapes = curriculum(CONFIG).shapes
    assert [curriculum(config).shapes for config in asked] == [(shape,) for shape in shapes]
    stages = json.loads(text)["stages"]
    assert [s["shape"] for s in stages] == [asdict(shape) for shape in shapes]
    assert code == 1 and [s["fits"] for s in stages] == [True, False, True]
