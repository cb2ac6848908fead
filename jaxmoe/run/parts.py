"""What a run is made of: data, state, the compiled step, evaluation, checkpoints, and what watches
over them. loop.py puts it in order.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxmoe import config as config_lib
from jaxmoe import mesh as mesh_lib
from jaxmoe.config import Config
from jaxmoe.curriculum import Shape, curriculum, shaped
from jaxmoe.data import damage, feed
from jaxmoe.data.corpus import Corpus
from jaxmoe.data.loader import Packed, Rows
from jaxmoe.data.mixture import Mixture
from jaxmoe.errors import UserError
from jaxmoe.forecast.alarms import Alarm
from jaxmoe.run import record, xla
from jaxmoe.run.batches import consumed, milestones, placed
from jaxmoe.run.checkpoint import Restored
from jaxmoe.run.evaluation import evaluate_sets, open_sets
from jaxmoe.run.faults import Faults, strikes_step
from jaxmoe.run.forecasting import ForecastHook
from jaxmoe.run.goodput import Ledger
from jaxmoe.run.guard import Guard
from jaxmoe.run.health import Health
from jaxmoe.run.meta import checked
from jaxmoe.run.meter import CodeLength, Meter
from jaxmoe.run.mirror import Mirror
from jaxmoe.run.params import Params, open_params
from jaxmoe.run.preemption import Preemption
from jaxmoe.run.profile import Profile
from jaxmoe.run.progress import ALARMS, Display, Tally
from jaxmoe.run.record import RunRecord
from jaxmoe.run.state import TrainState, abstract_state, init_state, relaid, state_as_saved
from jaxmoe.run.statistics import faint_experts, statistics
from jaxmoe.run.step import Batch, StepMetrics, add, eval_step, train_step
from jaxmoe.run.tiers import Tiers, near_folder
from jaxmoe.run.viewers import viewers
from jaxmoe.run.watching import BAND_KINDS, Watching, curves_of

__all__ = ["Parts"]

# Events that a person is told as they happen.
TOLD = (
    *("init", "resume", "fallback", "register", "overlap", "damaged", "alarm"),
    *("skip", "rollback", "slow", "corruption", "fault", "save-failed", "bad-steps", "expert"),
    *("profile", "mirror-failed"),
)
HERE = ("forecast/expected", "forecast/residual")  # nats per token; standard deviations


class Parts:
    """A run on a mesh: everything the loop needs, built once. All processes build the same."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        corpus: Corpus,
        run_dir: Path,
        display: Display,
        peak: float,
        origin: Params | None = None,
        *,
        writes: bool = True,
        ledger: Ledger | None = None,
    ) -> None:
        """`origin`: the parameters at `checkpoint.init_from`, where they are open already. Without
        `writes` the run directory stays as it is. `ledger`: that has the time of this start since
        its begin."""
        self.config, self.mesh, self.corpus, self.display = config, mesh, corpus, display
        self.origin = origin
        first = writes and jax.process_index() == 0
        self.record = RunRecord(run_dir, writes=first, viewers=viewers(config, run_dir))
        self.profile = Profile(config.log, run_dir, config.train.steps, writes=first)
        self.ledger = ledger or Ledger()
        self.plan = curriculum(config)
        self.stream = feed.open_stream(config, corpus)
        self.sets = open_sets(config, corpus)
        self.forecast: ForecastHook | None = None
        self.meter = Meter(config, peak=peak)
        self.preemption = Preemption(mesh)
        self.guard = Guard(config.guard, mesh)
        self.health = Health(config.health, mesh, run_dir, self._event)
        self.mirror = Mirror(config, run_dir, self._event, writes=writes)
        self.faults: Faults | None = None
        self.tokens = 0  # drawn: the data position, and what batch, length and mix follow
        self.code = CodeLength()
        self._compiled: dict[Shape, Callable[..., tuple[TrainState, StepMetrics]]] = {}
        self.evaluated: tuple[int, float] | None = None
        self.standing: dict[str, Any] = {}
        self.tally = Tally()
        self._faint = False  # an expert has vanished, and it was told

    @property
    def position(self) -> int:
        """Sequences drawn."""
        return self.plan.sequences(self.plan.step_of(self.tokens))

    def prepare(self) -> TrainState:
        """The state to go on from: the newest whole checkpoint's, or a fresh one."""
        self.record.begin(self.config)
        self.tally = Tally()
        for row in self.record.read(record.EVENTS):
            self.tally.add(row["what"], row["step"], row["why"])
        state = self._prepared()
        self.ledger.open(self.record)  # not sooner: what cannot be restored is left as it is
        self.ledger.line(step := int(state.step), back=step)
        return state

    def _prepared(self) -> TrainState:
        if jax.process_index() == 0:
            note = partial(self._event, "register")
            self.forecast = ForecastHook(self.config, self.record.folder, self.sets[0], note)
        planned = self.forecast.planned if self.forecast is not None else None
        self.watching = Watching(self.config, curves_of(planned))
        self.checkpoints = self._open_checkpoints()
        if self.config.faults:
            data, folder = self.corpus.guard, self.record.folder
            self.faults = Faults(self.config, self.mesh, data, folder, self._event)
        with self.ledger.during("restore"):
            restored = self._restored()
        if restored is None:
            self.record.rewind(0)
            self._event("start", 0, f"config {config_lib.fingerprint(self.config)}")
            for one in self.sets:
                if one.leaking:
                    why = (
                        f"{one.leaking} training documents repeat held-out set {one.held_out.name}"
                    )
                    self._event("overlap", 0, why)
            return self._fresh()
        self._resume(restored.step, restored.meta)
        return restored.state

    def _open_checkpoints(self) -> Tiers:
        own, folder = self.config.checkpoint, self.record.folder
        if own.near is not None and jax.process_count() > 1:
            raise UserError("checkpoint.near is for runs of one process; leave it out")
        kept = milestones(self.config, record.checkpoint_steps(folder))
        near = near_folder(folder, own)
        abstract = abstract_state(self.config, self.mesh)
        return Tiers.open(folder / record.CHECKPOINTS, own, abstract, kept, near)

    def _restored(self, last: int | None = None) -> Restored | None:
        """The newest whole checkpoint, up to a step."""

        def as_saved(meta: dict[str, Any]) -> TrainState:
            rounds = checked(meta)["config"]["mesh"].get("rounds", 1)
            return state_as_saved(self.config, self.mesh, rounds)

        abstract = abstract_state(self.config, self.mesh)
        restored = self.checkpoints.restore(abstract, as_saved, last)
        for step, why in restored.broken if restored else ():
            self._event("fallback", step, f"checkpoint {step} cannot be restored: {why}")
        return restored

    def _fresh(self) -> TrainState:
        """A state at step 0, its parameters drawn, or read where the config says."""
        place = self.config.checkpoint.init_from
        if place is None:
            return init_state(self.config, self.mesh)
        stored = self.origin or open_params(Path(place))
        by_layer = state_as_saved(self.config, self.mesh, 1).params
        params = relaid(stored.load(by_layer), abstract_state(self.config, self.mesh).params)
        for line in stored.differences(self.config.model):
            self._event("init", 0, f"trained on with another model.{line}")
        self._event("init", 0, f"parameters from {stored.where}")
        return init_state(self.config, self.mesh, params)

    def _resume(self, step: int, meta: dict[str, Any]) -> None:
        self.tokens = consumed(self.config, self.record.folder, step, meta)
        self.code = CodeLength(**meta.get("code", {"known": False}))
        self.meter.restore(meta["seconds"])
        self.record.rewind(step)
        if self.forecast is not None:
            self.forecast.restore(meta["forecast"], meta.get("register"))
        self.watching.freeze(self.forecast.frozen if self.forecast else None)
        self.watching.restore(meta.get("spikes", []), meta["forecast"])
        self.guard.restore(meta.get("guard"))
        self.health.closely = meta.get("closely", 0)
        if meta["forecast"] and meta["forecast"][-1][0] == step:
            self.evaluated = (step, meta["forecast"][-1][1])
        self._stand()
        self._event("resume", step, f"from checkpoint {step}")

    def next_batch(self) -> Batch:
        """Rows of the stream from where the last batch ended; each process reads its own."""
        step = self.plan.step_of(self.tokens)
        shape = self.plan.at(step).shape
        self.tokens += shape.tokens
        if self.faults is not None:
            self.faults.before_reading(step)

        @cache  # asked by every device, and for every part of the batch
        def rows(start: int, stop: int) -> Rows | Packed:
            read = step if self.faults is None else self.faults.read_instead(step)
            drawn = feed.read_rows(self.stream, self.config, read, start, stop)
            eot = self.corpus.tokenizer.eot
            tokens, weights = damage.hide(drawn.tokens, drawn.weights, eot)
            return drawn._replace(tokens=tokens, weights=weights)

        batch = self._placed(shape.batch, shape.length, rows)
        if not isinstance(self.stream, Mixture):
            return batch
        told = partial(self.stream.first_times, step)
        size = (shape.batch, len(self.stream.names))
        sources_BY = mesh_lib.global_array(self.mesh, size, told)
        return dataclasses.replace(batch, sources_BY=sources_BY)

    def _placed(self, size: int, length: int, rows: Callable[[int, int], Any]) -> Batch:
        eot = self.corpus.tokenizer.eot if self.config.data.document_mask else None
        return placed(self.mesh, (size, length), rows, eot)

    def take(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        """The update by the batch that was drawn last; the state is used up."""
        step = self.plan.step_of(self.tokens) - 1  # that the batch was drawn for
        shape = self.plan.at(step).shape
        if self.guard.active:
            since = self.plan.at(step).step + 1  # of this shape and this phase of the mix
            batch = dataclasses.replace(batch, limits=self.guard.limits(step + 1, since))
        if self.faults is not None and strikes_step(self.config):
            batch = dataclasses.replace(batch, fault=self.faults.in_step(step + 1))
        if shape not in self._compiled:
            self._compile(state, batch, step, shape)
        self.health.stepping(step + 1)
        self.ledger.handed(shape)
        with self.health.pace.waiting(), self.profile.step(step + 1):  # waits for room in its queue
            return self._compiled[shape](state, batch)

    def _compile(self, state: TrainState, batch: Batch, step: int, shape: Shape) -> None:
        """Ahead of the first step of a shape, so that compiling and running are timed apart."""
        begin = time.perf_counter()
        self.health.starting("compiling the step")
        with self._paused("compile"), self.profile.naming(), xla.cache_hits() as hits:
            lowered = train_step.lower(state, batch, shaped(self.config, shape))
            self._compiled[shape], left_out = xla.compile_with_options(lowered)
        seconds = time.perf_counter() - begin
        self.meter.compiled(seconds)
        size = ""
        if len(self.plan.shapes) > 1:
            size = f"for {shape.batch} x {shape.length} tokens "
            self._event("shape", step, f"compiled {size}from here on, in {seconds:.1f} s")
        where = " (it was in the compilation cache)" if hits else ""
        self.display.note(f"compiled the step {size}in {seconds:.1f} s{where}")
        if left_out:
            self.display.note(f"this XLA does not know {', '.join(left_out)}: left out")

    def evaluate(self, step: int, state: TrainState) -> None:
        """The held-out losses, recorded, and the first told to the forecast; once a step."""
        if self.evaluated is not None and self.evaluated[0] == step:
            return
        with self._paused("evaluation"):
            if self.forecast is not None:  # registered before the next loss is known
                self.forecast.settle()
                self.watching.freeze(self.forecast.frozen)
            lines = evaluate_sets(self.sets, partial(self._held_out_sums, state))
            for line in lines:
                tokens = self.plan.tokens(step)
                self.record.evaluated({"step": step, "tokens": tokens, **line})
            nll = lines[0]["nll"]
            self.evaluated = (step, nll)
            self._tell(step, self.watching.after_eval(step, nll))
            self._stand()
            if self.forecast is not None:
                self.forecast.after_eval(step, nll)

    def look(self, step: int, state: TrainState) -> None:
        """Records every layer's parameters."""
        with self._paused("other"):
            arrays = statistics(state.params, self.config)
            self.record.append(record.LAYERS, {"step": step, "arrays": arrays})
        faint = [*faint_experts(arrays)]
        if faint and not self._faint:
            name, layer, share = faint[0]
            more = f", and {len(faint) - 1} more" if len(faint) > 1 else ""
            why = f"{name}, layer {layer}: an expert has {share:.2g} of the middle one's size{more}"
            self._event("expert", step, why)
        self._faint = bool(faint)

    def _stand(self) -> None:
        """Where the run stands against its forecasts, since the last eval; for the metrics."""
        if self.forecast is not None:
            self.standing = self.forecast.standing()
            if self.watching.expected is not None:
                here = (self.watching.expected, self.watching.residual)
                self.standing |= dict(zip(HERE, here, strict=True))

    def held_out_loss(self, state: TrainState) -> float:
        """Nats per token over the whole of the first held-out set."""
        sums = partial(self._held_out_sums, state)
        return evaluate_sets(self.sets[:1], sums)[0]["nll"]

    def _held_out_sums(self, state: TrainState, batches: Sequence[Rows]) -> tuple[float, float]:
        """(nats, tokens)."""
        total = None
        self.health.evaluating(len(batches))
        for tokens, weights in batches:
            rows = lambda a, b, t=tokens, w=weights: Rows(t[a:b], w[a:b])  # noqa: E731
            batch = self._placed(len(weights), weights.shape[1], rows)
            sums = eval_step(state.params, batch, self.config)
            total = sums if total is None else add(total, sums)
        assert total is not None
        host = jax.device_get(total)
        return float(host.nll), float(host.weight)

    @property
    def bits_per_nat(self) -> float:
        """Bits per byte of the first held-out set for one nat per token."""
        return self.sets[0].bits_per_nat

    def saves_near(self, step: int) -> bool:
        """Whether the state of a step goes to the cheap place."""
        own = self.config.checkpoint
        return own.near is not None and step % own.near_every == 0

    def save(self, step: int, state: TrainState, *, near: bool = False) -> None:
        """The state and all that a resume needs. `near`: the cheap place only."""
        self.ledger.line(step)  # where a restart may go on, so that no line is of both sides of it
        with self.ledger.during("checkpoint"):
            self.health.compare(step, state)
        self.health.saving(step)
        with self._paused("checkpoint"):
            meta = {
                "step": step,
                "tokens": self.tokens,
                "position": self.position,
                "code": dataclasses.asdict(self.code),
                "data": self.corpus.fingerprint,
                "forecast": self.forecast.state() if self.forecast is not None else [],
                "register": self.forecast.head() if self.forecast is not None else None,
                "spikes": self.watching.state(),
                "guard": self.guard.state(),
                "closely": self.health.closely,
                "seconds": self.meter.seconds,
                "config": config_lib.as_dict(self.config),
            }
            self._save(step, state, meta, near)
        self.ledger.line(step)

    def _save(self, step: int, state: TrainState, meta: dict[str, Any], near: bool) -> None:
        full = self.faults is not None and self.faults.disk_full(step)
        loss = self.evaluated[1] if self.evaluated and self.evaluated[0] == step else math.inf
        self.settle_saves(step)
        problem = self.checkpoints.save(step, state, meta, near=near, loss=loss, disk_full=full)
        if problem:
            self._event("save-failed", step, problem)
        if problem or near:
            return
        self._event("checkpoint", step, "saving began")
        if self.faults is not None and self.faults.damages(step):
            self.settle_saves(step)
            self.faults.damage(step, self.record.folder / record.CHECKPOINTS / str(step))

    def end_trace(self, step: int) -> None:
        """Of the steps up to this one, all of them done."""
        with self._paused("other"):
            folder = self.profile.end()
        self._event("profile", step, f"a trace is in {folder}/")

    def settle_saves(self, step: int) -> None:
        """Waits for what is being saved; an event says if it cannot be."""
        if problem := self.checkpoints.settle():
            self._event("save-failed", step, problem)

    @contextmanager
    def _paused(self, bucket: str) -> Iterator[None]:
        """What is done in here is no part of a step; its time goes to a bucket of the ledger."""
        with self.meter.paused(), self.health.pace.paused(), self.ledger.during(bucket):
            yield

    def _tell(self, step: int, alarms: Sequence[Alarm]) -> None:
        for alarm in alarms:
            self._event("alarm", step, str(alarm))
            if alarm.kind not in BAND_KINDS:  # those all processes raise
                self.health.look_closely(step)

    def _event(self, what: str, step: int, why: str) -> None:
        self.record.event(what, step=step, why=why)
        self.tally.add(what, step, why)
        if what in TOLD:
            self.display.note(f"{what}: {why}", alarm=what in ALARMS)
