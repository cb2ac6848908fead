"""The training loop. Its order is fixed: eval, checkpoint, next batch, step, read the step before.

- Eval and checkpoint see the same state; the checkpoint holds what the eval told the forecast.
- The next batch is drawn after the checkpoint is saved, so the saved position is the batch's own.
- Metrics are read a step late: the device is never waited for, except before an eval or a save,
  which must not hide a step's time and must not leave a logged step behind.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxmoe import config as config_lib
from jaxmoe import mesh as mesh_lib
from jaxmoe.config import Config
from jaxmoe.curriculum import Shape, curriculum, shaped
from jaxmoe.data import damage, feed
from jaxmoe.data.corpus import Corpus
from jaxmoe.data.loader import Packed, Rows, documents
from jaxmoe.data.mixture import Mixture
from jaxmoe.errors import UserError
from jaxmoe.forecast.alarms import Alarm
from jaxmoe.run import record, xla
from jaxmoe.run.checkpoint import Checkpoints
from jaxmoe.run.evaluation import evaluate_sets, open_sets
from jaxmoe.run.forecasting import ForecastHook
from jaxmoe.run.meter import CodeLength, Meter
from jaxmoe.run.params import Params, open_params
from jaxmoe.run.preemption import Preempted, Preemption
from jaxmoe.run.progress import Display
from jaxmoe.run.record import RunRecord
from jaxmoe.run.state import TrainState, abstract_state, init_state, relaid, state_as_saved
from jaxmoe.run.step import Batch, StepMetrics, add, eval_step, train_step
from jaxmoe.run.watching import Watching, curves_of

HERE = ("forecast/expected", "forecast/residual")  # nats per token; standard deviations


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of a finished run: final held-out loss."""

    step: int
    nll: float  # nats per token
    bits_per_byte: float


def due(step: int, every: int) -> bool:
    """The one predicate for periodic work (the end of a run is asked for separately)."""
    return step % every == 0


class Alarmed(Exception):
    """An alarm has ended the run, as forecast.on_alarm says; its checkpoint is saved."""


class Trainer:
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
    ) -> None:
        """`origin`: the parameters at `checkpoint.init_from`, where they are open already. Without
        `writes` the run directory stays as it is."""
        self.config, self.mesh, self.corpus, self.display = config, mesh, corpus, display
        self.origin = origin
        self.record = RunRecord(run_dir, writes=writes and jax.process_index() == 0)
        self.plan = curriculum(config)
        self.stream = feed.open_stream(config, corpus)
        self.sets = open_sets(config, corpus)
        self.forecast: ForecastHook | None = None
        self.meter = Meter(config, peak=peak)
        self.preemption = Preemption(mesh)
        self.tokens = 0  # drawn: the data position, and what batch, length and mix follow
        self.code = CodeLength()
        self._compiled: dict[Shape, Callable[..., tuple[TrainState, StepMetrics]]] = {}
        self.evaluated: tuple[int, float] | None = None
        self.standing: dict[str, Any] = {}

    @property
    def position(self) -> int:
        """Sequences drawn."""
        return self.plan.sequences(self.plan.step_of(self.tokens))

    # Set up

    def prepare(self) -> TrainState:
        """The state to go on from: the newest whole checkpoint's, or a fresh one."""
        self.record.begin(self.config)
        if jax.process_index() == 0:
            note = partial(self._event, "register")
            self.forecast = ForecastHook(self.config, self.record.folder, self.sets[0], note)
        planned = self.forecast.planned if self.forecast is not None else None
        self.watching = Watching(self.config, curves_of(planned))
        self.checkpoints = Checkpoints(
            self.record.folder / record.CHECKPOINTS, self.config.checkpoint
        )
        abstract = abstract_state(self.config, self.mesh)

        def as_saved(meta: dict[str, Any]) -> TrainState:
            rounds = meta["config"]["mesh"].get("rounds", 1)
            return state_as_saved(self.config, self.mesh, rounds)

        restored = self.checkpoints.restore(abstract, as_saved)
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
        for step, why in restored.broken:
            self._event("fallback", step, f"checkpoint {step} cannot be restored: {why}")
        self._resume(restored.step, restored.meta)
        return restored.state

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
        self.tokens = self._consumed(step, meta)
        self.code = CodeLength(**meta.get("code", {"known": False}))
        self.meter.restore(meta["seconds"])
        self.record.rewind(step)
        if self.forecast is not None:
            self.forecast.restore(meta["forecast"], meta.get("register"))
        self.watching.freeze(self.forecast.frozen if self.forecast else None)
        self.watching.restore(meta.get("spikes", []), meta["forecast"])
        if meta["forecast"] and meta["forecast"][-1][0] == step:
            self.evaluated = (step, meta["forecast"][-1][1])
        self._stand()
        self._event("resume", step, f"from checkpoint {step}")

    def _consumed(self, step: int, meta: dict[str, Any]) -> int:
        """Tokens before a checkpoint. Those of before there were ramps have sequences alone."""
        sequences = meta["position"]
        tokens = meta.get("tokens", sequences * self.config.train.seq_len)
        wanted = self.plan.tokens(step), self.plan.sequences(step)
        if (tokens, sequences) != wanted:
            raise UserError(
                f"{self.record.folder}: its checkpoint {step} was saved after {tokens} tokens in"
                f" {sequences} sequences, and by this config that step begins after {wanted[0]} in"
                f" {wanted[1]}; bring the config back, or give another --run-dir"
            )
        return tokens

    # The loop

    def run(self, state: TrainState) -> Outcome:
        with self.preemption.listening():
            return self._run(state)

    def _run(self, state: TrainState) -> Outcome:
        config = self.config
        step, last = int(state.step), config.train.steps
        start, pending = step, None
        while True:
            if due(step, config.eval.every) or step == last:
                pending = self._read(pending)
                self.evaluate(step, state)
            acts, asked = self.watching.acts(), self.preemption.asked()
            saves = due(step, config.checkpoint.every) or step in config.checkpoint.at
            if step != start and (saves or step == last or acts or asked):
                pending = self._read(pending)
                self.save(step, state)
            if step == last:
                break
            if acts and config.forecast.on_alarm == "stop":
                self._put_down()
                raise Alarmed(f"stopped at step {step} by an alarm: {acts}")
            if asked:
                self._put_down()
                done = f"saved at step {step}" if step else "before the first step"
                self._event("preemption", step, f"{self.preemption.why}; {done}")
                raise Preempted(f"asked to end by {self.preemption.why}; {done}")
            if self.plan.at(step).shape not in self._compiled:
                pending = self._read(pending)
            with self.meter.drawing():
                batch = self._draw(step)
            state, metrics = self.take(state, batch)
            pending, earlier = (step + 1, metrics), pending
            self._read(earlier)
            step += 1
        self.checkpoints.close()
        assert self.evaluated is not None
        nll = self.evaluated[1]
        self._event("done", step, f"held-out {nll:.5f} nats per token")
        return Outcome(step=step, nll=nll, bits_per_byte=nll * self.bits_per_nat)

    def _put_down(self) -> None:
        """Waits until all that was begun is on disk."""
        self.checkpoints.close()
        if self.forecast is not None:
            self.forecast.settle()

    def _draw(self, step: int) -> Batch:
        """The next batch; damage that it came upon is an event, whether it stops the run or not."""
        try:
            return self.next_batch()
        finally:
            for what in self.corpus.guard.news() if self.corpus.guard else ():
                self._event("damaged", step, what)

    def next_batch(self) -> Batch:
        """Rows of the stream from where the last batch ended; each process reads its own."""
        step = self.plan.step_of(self.tokens)
        shape = self.plan.at(step).shape
        self.tokens += shape.tokens

        @cache  # asked by every device, and for every part of the batch
        def rows(start: int, stop: int) -> Rows | Packed:
            drawn = feed.read_rows(self.stream, self.config, step, start, stop)
            eot = self.corpus.tokenizer.eot
            tokens, weights = damage.hide(drawn.tokens, drawn.weights, eot)
            return drawn._replace(tokens=tokens, weights=weights)

        batch = self._batch(shape.batch, shape.length, rows)
        if not isinstance(self.stream, Mixture):
            return batch
        told = partial(self.stream.first_times, step)
        size = (shape.batch, len(self.stream.names))
        sources_BY = mesh_lib.global_array(self.mesh, size, told)
        return dataclasses.replace(batch, sources_BY=sources_BY)

    def _batch(self, size: int, length: int, rows: Callable[[int, int], Any]) -> Batch:
        """`rows(start, stop)` is asked only for rows that this process holds."""
        eot = self.corpus.tokenizer.eot

        def whole(width: int, part: Callable[[Any], np.ndarray]) -> jax.Array:
            return mesh_lib.global_array(self.mesh, (size, width), lambda a, b: part(rows(a, b)))

        def numbers(r: Rows | Packed) -> np.ndarray:
            if isinstance(r, Packed):
                return r.documents
            return documents(r.tokens[:, :-1], eot, r.weights)

        return Batch(
            tokens_BL=whole(length + 1, lambda r: r.tokens),
            weights_BL=whole(length, lambda r: r.weights),
            documents_BL=whole(length, numbers) if self.config.data.document_mask else None,
        )

    def take(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        """The update by the batch that was drawn last; the state is used up."""
        step = self.plan.step_of(self.tokens) - 1  # that the batch was drawn for
        shape = self.plan.at(step).shape
        if shape not in self._compiled:
            self._compile(state, batch, step, shape)
        return self._compiled[shape](state, batch)

    def _compile(self, state: TrainState, batch: Batch, step: int, shape: Shape) -> None:
        """Ahead of the first step of a shape, so that compiling and running are timed apart."""
        begin = time.perf_counter()
        with self.meter.paused(), xla.cache_hits() as hits:
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

    def _read(self, pending: tuple[int, StepMetrics] | None) -> None:
        """Waits for a step's metrics; logs and shows them where due."""
        if pending is None:
            return
        step, metrics = pending
        sums = jax.device_get(metrics.sums)
        nll = float(sums.nll / sums.weight)
        first = self.meter.first_step_seconds is None
        self.meter.stepped(step)
        if first:
            self._describe_start()
        # The gradients too: they are in the parameters already, and must not be saved.
        norm = float(metrics.grad_norm)
        if not (math.isfinite(nll) and math.isfinite(norm)):
            why = f"the train loss is {nll}, the gradient's norm {norm}"
            self._event("crash", step, why)
            raise FloatingPointError(f"step {step}: {why}")
        self._count_code(step, sums)
        self._tell(step, self.watching.after_step(step, nll, norm))
        if due(step, self.config.train.log_every) or step == self.config.train.steps:
            line = {**self.meter.line(step, metrics), **self.code.line(), **self.standing}
            self.record.append(record.METRICS, line)
            self.display.show(self.meter.view(step, line, self._known()))

    def _count_code(self, step: int, sums: Any) -> None:
        if isinstance(self.stream, Mixture):
            for name, nats, tokens in zip(
                self.stream.names, sums.nll_Y, sums.weight_Y, strict=True
            ):
                self.code.add(name, float(nats), round(float(tokens)))
        elif feed.first_time(self.stream, self.config, step - 1):
            self.code.add(feed.TRAIN, float(sums.nll), round(float(sums.weight)))

    def _describe_start(self) -> None:
        seconds = {
            "compile_seconds": self.meter.compile_seconds,
            "first_step_seconds": self.meter.first_step_seconds,
        }
        self.record.update(record.ENVIRONMENT, seconds)
        self.display.note(f"first step {self.meter.first_step_seconds:.2f} s")

    # Eval and checkpoint

    def evaluate(self, step: int, state: TrainState) -> None:
        """The held-out losses, recorded, and the first told to the forecast; once a step."""
        if self.evaluated is not None and self.evaluated[0] == step:
            return
        with self.meter.paused():
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
        for tokens, weights in batches:
            rows = lambda a, b, t=tokens, w=weights: Rows(t[a:b], w[a:b])  # noqa: E731
            batch = self._batch(len(weights), weights.shape[1], rows)
            sums = eval_step(state.params, batch, self.config)
            total = sums if total is None else add(total, sums)
        assert total is not None
        host = jax.device_get(total)
        return float(host.nll), float(host.weight)

    @property
    def bits_per_nat(self) -> float:
        """Bits per byte of the first held-out set for one nat per token."""
        return self.sets[0].bits_per_nat

    def save(self, step: int, state: TrainState) -> None:
        with self.meter.paused():
            meta = {
                "step": step,
                "tokens": self.tokens,
                "position": self.position,
                "code": dataclasses.asdict(self.code),
                "data": self.corpus.fingerprint,
                "forecast": self.forecast.state() if self.forecast is not None else [],
                "register": self.forecast.head() if self.forecast is not None else None,
                "spikes": self.watching.state(),
                "seconds": self.meter.seconds,
                "config": config_lib.as_dict(self.config),
            }
            self.checkpoints.save(step, state, meta)
            self._event("checkpoint", step, "saving began")

    def _known(self) -> dict[str, Any]:
        """What the view shows beside the metrics, in bits per byte."""
        unit = self.bits_per_nat
        known = self.standing

        def bits(*names: str) -> tuple[float, ...] | None:
            found = [known[key] for n in names if (key := f"forecast/{n}") in known]
            return tuple(unit * value for value in found) or None

        return {
            "bits_per_byte": self.evaluated and self.evaluated[1] * unit,
            "forecast": bits("final", "final_q05", "final_q95"),
            "registered": bits("registered_final"),
            "expected": bits("expected"),
            "residual": known.get("forecast/residual"),
        }

    def _tell(self, step: int, alarms: Sequence[Alarm]) -> None:
        for alarm in alarms:
            self._event("alarm", step, str(alarm))

    def _event(self, what: str, step: int, why: str) -> None:
        self.record.event(what, step=step, why=why)
        if what in ("init", "resume", "fallback", "register", "overlap", "damaged", "alarm"):
            self.display.note(f"{what}: {why}")
