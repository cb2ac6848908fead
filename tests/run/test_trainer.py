"""The loop's order, what is logged when, and the meter: in this process, on one device."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from small import small

from jaxmoe import mesh as mesh_lib
from jaxmoe.config import CheckpointConfig, Config, EvalConfig, ForecastConfig, TrainConfig, replace
from jaxmoe.data.cache import Corpus, prepare
from jaxmoe.model.lm import lm_loss
from jaxmoe.run import meter as meter_lib
from jaxmoe.run.dashboard import display
from jaxmoe.run.loop import Trainer
from jaxmoe.run.meter import Meter
from jaxmoe.run.progress import Plain, Silent, View
from jaxmoe.run.state import TrainState
from jaxmoe.run.step import StepMetrics


def seven() -> Config:
    """Seven steps: an eval every 2, a checkpoint every 3, a line every 2."""
    return replace(
        small(),
        train=TrainConfig(steps=7, batch_size=8, seq_len=24, log_every=2),
        eval=EvalConfig(every=2, batch_size=64),
        checkpoint=CheckpointConfig(every=3),
        forecast=ForecastConfig(first=2, every=2),
    )


@pytest.fixture(scope="module")
def corpus(text_cache: Path) -> Corpus:
    config = small()
    data = replace(config.data, cache=str(text_cache))
    return prepare(data, config.model.vocab_size)


class Spied(Trainer):
    """A trainer that notes what it does, in order."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.did: list[str] = []
        self.held_out_state: TrainState | None = None

    def evaluate(self, step: int, state: TrainState) -> None:
        self.did.append(f"eval {step}")
        super().evaluate(step, state)

    def save(self, step: int, state: TrainState) -> None:
        self.did.append(f"save {step} at {self.position}")
        super().save(step, state)

    def next_batch(self) -> Any:
        self.did.append(f"batch {self.position}")
        return super().next_batch()

    def take(self, state: TrainState, batch: Any) -> Any:
        self.did.append("step")
        return super().take(state, batch)

    def _read(self, pending: tuple[int, StepMetrics] | None) -> None:
        if pending is not None:
            self.did.append(f"read {pending[0]}")
        super()._read(pending)


@dataclass(frozen=True)
class Ran:
    trainer: Spied
    run_dir: Path
    views: list[View]


class Collect(Silent):
    def __init__(self) -> None:
        self.views: list[View] = []

    def show(self, view: View) -> None:
        self.views.append(view)


@pytest.fixture(scope="module")
def ran(mesh: Mesh, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    run_dir, shown = tmp_path_factory.mktemp("spied") / "run", Collect()
    trainer = Spied(seven(), mesh, corpus, run_dir, shown, 1e12)
    trainer.run(trainer.prepare())
    return Ran(trainer=trainer, run_dir=run_dir, views=shown.views)


def test_the_order_is_eval_checkpoint_batch_step_and_the_read_of_the_step_before(ran: Ran):
    """The saved position is that of the batch drawn next; metrics lag by one step, except that
    none is left behind by an eval or a save."""
    assert ran.trainer.did == [
        *("eval 0", "batch 0", "step"),
        *("batch 8", "step", "read 1"),
        *("read 2", "eval 2", "batch 16", "step"),
        *("read 3", "save 3 at 24", "batch 24", "step"),
        *("read 4", "eval 4", "batch 32", "step"),
        *("batch 40", "step", "read 5"),
        *("read 6", "eval 6", "save 6 at 48", "batch 48", "step"),
        *("read 7", "eval 7", "save 7 at 56"),
    ]


def test_lines_come_every_log_every_and_at_the_end(ran: Ran):
    rows = (ran.run_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [2, 4, 6, 7]
    assert [view.step for view in ran.views] == [2, 4, 6, 7]
    assert ran.views[-1].steps == 7
    assert ran.views[0].bits_per_byte is not None


def test_held_out_loss_is_the_plain_mean_over_all_its_tokens(ran: Ran, mesh: Mesh):
    """One token sequence after the other, summed in float64; every target once."""
    config, trainer = seven(), ran.trainer
    restored = trainer.prepare()
    length = config.train.seq_len
    tokens = trainer.corpus.heldout.tokens.astype(np.int32)
    total, count = 0.0, 0
    loss = jax.jit(
        lambda params, x, y, w: lm_loss(params, x, y, w, config.model)[0].nll,
    )
    for start in range(0, len(tokens) - 1, length):
        row = tokens[start : start + length + 1]
        n = len(row) - 1
        padded = np.zeros(length + 1, np.int32)
        padded[: n + 1] = row
        weights = (np.arange(length) < n).astype(np.float32)
        parts = (padded[:-1], padded[1:], weights)
        x, y, w = (jax.device_put(a[None], mesh_lib.batch_sharding(mesh, 2)) for a in parts)
        total += float(loss(restored.params, x, y, w))
        count += n
    assert count == len(tokens) - 1
    assert trainer.held_out_loss(restored) == pytest.approx(total / count, rel=1e-6)
    assert trainer.evaluated is not None
    assert trainer.evaluated == (7, pytest.approx(total / count, rel=1e-6))


def test_gradients_that_are_not_finite_stop_the_run_before_they_are_saved(
    ran: Ran, mesh: Mesh, corpus: Corpus, tmp_path: Path
):
    """The loss of step 3 is still finite; the parameters after it are not."""
    trainer = Spied(seven(), mesh, corpus, tmp_path / "run", Silent(), 1e12)
    state = trainer.prepare()
    plain = trainer.take

    def poisoned(state: TrainState, batch: Any) -> Any:
        state, metrics = plain(state, batch)
        bad = metrics.replace(grad_norm=jnp.float32(jnp.inf))
        return state, bad if int(state.step) == 3 else metrics

    trainer.take = poisoned  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(FloatingPointError, match="step 3: .*the gradient's norm inf"):
        trainer.run(state)
    assert not any(did.startswith("save") for did in trainer.did)
    trainer.checkpoints.close()
    *_, last = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    assert json.loads(last)["what"] == "crash"


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


def test_the_meter_counts_steps_alone(ran: Ran, monkeypatch: pytest.MonkeyPatch):
    """Not setting up, compiling, the first step, evals or checkpoints."""
    clock = Clock()
    monkeypatch.setattr(meter_lib, "time", clock)
    config = seven()
    meter = Meter(config, peak=1e9)

    def paused(seconds: float) -> None:
        with meter.paused():
            clock.now += seconds

    clock.now += 50  # set up
    paused(7)  # the eval at step 0
    clock.now += 30
    meter.compiled(30)
    clock.now += 4
    meter.stepped(1)
    assert (meter.compile_seconds, meter.first_step_seconds) == (30, 4)
    assert meter._window()["perf/step_seconds"] is None
    clock.now += 0.5
    meter.stepped(2)
    paused(20)
    clock.now += 0.25
    paused(20)  # in the middle of a step
    clock.now += 0.25
    meter.stepped(3)
    window = meter._window()
    assert window["perf/step_seconds"] == pytest.approx(0.5)
    assert window["perf/tokens_per_second"] == pytest.approx(8 * 24 / 0.5)
    assert meter._window() == window  # no step since: that of before
    meter.restore(1000)
    assert meter.seconds == pytest.approx(1000 + clock.now - 100)


def test_the_view_says_what_is_known_and_nothing_else():
    assert View(step=3, steps=9).words() == []
    view = View(
        step=3,
        steps=9,
        tokens_per_second=12345.6,
        train_nll=2.5,
        bits_per_byte=1.25,
        mfu=0.31,
        load=(0.5, 2.0),
        seconds_left=61,
        forecast=(1.1, 1.0, 1.2),
    )
    assert view.words() == [
        "12,346 tok/s",
        "MFU 31%",
        "loss 2.500",
        "held-out 1.250 b/B",
        "final forecast 1.100 [1.000, 1.200]",
        "expert load 0.50..2.00",
    ]
    assert replace(view, dead=3).words()[-1] == "expert load 0.50..2.00, 3 dead"


def test_only_the_writing_process_shows_anything(capsys: Any):
    silent, plain = display("auto", "small", writes=False), display("auto", "small", writes=True)
    assert isinstance(plain, Plain)  # under pytest stdout is no terminal
    for view in (silent, plain):
        view.note("hello")
        view.show(View(step=1, steps=2, seconds_left=3700))
        view.close()
    assert capsys.readouterr().out == "hello\nstep 1/2  1:01:40 left  \n"


def test_perplexity_of_a_fresh_model_is_near_uniform(ran: Ran):
    first = json.loads((ran.run_dir / "evals.jsonl").read_text().splitlines()[0])
    assert first["nll"] == pytest.approx(math.log(264), rel=0.1)
    unit = first["bits_per_byte"] / first["nll"]
    held_out = ran.trainer.corpus.heldout
    assert unit == pytest.approx((len(held_out.tokens) - 1) / held_out.bytes / math.log(2))
