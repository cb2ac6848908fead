"""The training loop. Its order is fixed: eval, checkpoint, next batch, step, read the step before.

- Eval and checkpoint see the same state; the checkpoint holds what the eval told the forecast.
- The next batch is drawn after the checkpoint is saved, so the saved position is the batch's own.
- Metrics are read a step late: the device is never waited for, except before an eval or a save,
  which must not hide a step's time and must not leave a logged step behind.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax

from jaxmoe.data import feed
from jaxmoe.data.mixture import Mixture
from jaxmoe.errors import UserError
from jaxmoe.run import record
from jaxmoe.run.guard import BadStep
from jaxmoe.run.health import Corrupted
from jaxmoe.run.parts import Parts
from jaxmoe.run.preemption import Preempted
from jaxmoe.run.progress import in_bits, of_line
from jaxmoe.run.state import TrainState
from jaxmoe.run.step import Batch, StepMetrics, as_after


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


def _idle(pending: tuple[int, StepMetrics] | None) -> bool:
    """Whether the device has no step left to do."""
    if pending is None:
        return True
    last: Any = pending[1].sums.nll  # is_ready is of every array, and not in jax's type of one
    return last.is_ready()


class _RollBack(Exception):
    """A bad step, after which the run goes on from an earlier state (guard.bad_step=rollback)."""

    def __init__(self, step: int, why: str) -> None:
        super().__init__(why)
        self.step = step


class Trainer(Parts):
    """A run on a mesh, from its start or the newest checkpoint to its end."""

    def run(self, state: TrainState) -> Outcome:
        with (
            self.preemption.listening(),
            self.record.viewing(),
            self.profile.ending(),
            self.mirror,
        ):
            saved: int | None = int(state.step)  # or there is nothing to save
            while True:
                try:
                    return self._run(state, saved)
                except _RollBack as bad:
                    step, why = bad.step, str(bad)
                except (Corrupted, FloatingPointError):  # found by all processes at one step
                    self.settle_saves(self.health.last_read)
                    raise
                del state  # a second one would not fit
                with self.ledger.during("restore"):
                    state, saved = self._rolled_back(step, why), None

    def _run(self, state: TrainState, saved: int | None) -> Outcome:
        """Up to the end. `saved`: the step whose checkpoint is there; None: make one at once."""
        config = self.config
        self.ledger.turn("steps")
        step, last = int(state.step), config.train.steps
        pending = None
        while True:
            self.health.turn(step, state, config.train.log_every)
            if self.profile.ends(step):
                pending = self._read(pending)
                self.end_trace(step)
            if step != saved and self.health.looks(step):
                pending = self._read(pending)
                self.look(step, state)
            if due(step, config.eval.every) or step == last:
                pending = self._read(pending)
                self.evaluate(step, state)
            if self.watching.alarmed:  # what is read here may be worse, and comes first
                pending = self._read(pending)
            acts = self.watching.acts()
            with self.health.pace.waiting():
                asked = self.preemption.asked()
            saves = due(step, config.checkpoint.every) or step in config.checkpoint.at
            if step != saved and (saves or step == last or acts or asked or saved is None):
                pending = self._read(pending)
                self.save(step, state)
                saved = step
            elif step != saved and self.saves_near(step):
                pending = self._read(pending)
                self.save(step, state, near=True)
                saved = step
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
            if self.faults is not None:
                state = self.faults.before(step + 1, state)
            if self.profile.begins(step):
                pending = self._read(pending)
                self.profile.begin(step)
            with self.meter.drawing(), self.ledger.drawing(lambda p=pending: _idle(p)):
                batch = self._draw(step)
            state, metrics = self.take(state, batch)
            pending, earlier = (step + 1, metrics), pending
            self._read(earlier)
            step += 1
        self._put_down()
        self.ledger.turn("other")
        assert self.evaluated is not None
        nll = self.evaluated[1]
        self._event("done", step, f"held-out {nll:.5f} nats per token")
        return Outcome(step=step, nll=nll, bits_per_byte=nll * self.bits_per_nat)

    def _rolled_back(self, step: int, why: str) -> TrainState:
        """The state of before a bad update and what led to it, as if it were that of after: the
        updates between are left out, and their batches are not read again."""
        self.health.starting("rolling back")
        self.settle_saves(step)
        known = [one for one in self.checkpoints.steps() if one < step]
        if not known and step > self.config.checkpoint.every:
            raise BadStep(f"step {step}: {why}; no checkpoint is there to go back to")
        # The oldest one is the best there is where none is as far back as it should be.
        wanted = max(step - 1 - self.config.guard.rewind, min(known, default=0))
        restored = self._restored(wanted)
        begun, state = (0, self._fresh()) if restored is None else (restored.step, restored.state)
        self.checkpoints.forget(begun)
        self.mirror.forget(begun)
        self.tokens = self.plan.tokens(step)
        self.guard.rolled_back(begun, step, restored.meta.get("guard") if restored else None)
        self._event("rollback", step, f"{why}; updates {begun + 1} to {step} are left out")
        self.ledger.line(step, back=begun)
        return as_after(step, state)

    def _put_down(self) -> None:
        """Waits until all that was begun is on disk.

        Raises:
            UserError: the last state is not, since there is no room, or no leave to write.
        """
        with self.ledger.during("evaluation"):
            if self.forecast is not None:
                self.forecast.settle()
        with self.ledger.during("checkpoint"):
            problem = self.checkpoints.close()
        if problem:
            raise UserError(f"{problem}; mend that, and run the same command again")
        self.record.check()
        self.mirror.end_in_order()
        self.health.leaving()

    def _draw(self, step: int) -> Batch:
        """The next batch; damage that it came upon is an event, whether it stops the run or not."""
        try:
            return self.next_batch()
        finally:
            for what in self.corpus.guard.news() if self.corpus.guard else ():
                self._event("damaged", step, what)

    def _read(self, pending: tuple[int, StepMetrics] | None) -> None:
        """Waits for a step's metrics; logs and shows them where due."""
        if pending is None:
            return
        step, metrics = pending
        with self.health.pace.waiting():
            sums = jax.device_get(metrics.sums)
        nll = float(sums.nll / sums.weight)
        self.health.read(step)
        first = self.meter.first_step_seconds is None
        self.meter.stepped(step)
        self.ledger.ended(step)
        if first:
            self._describe_start()
        norm = float(metrics.grad_norm)
        if self._is_bad(step, nll, norm, metrics):
            return
        self._count_code(step, sums)
        self._tell(step, self.watching.after_step(step, nll, norm))
        if due(step, self.config.train.log_every) or step == self.config.train.steps:
            line = {**self.meter.line(step, metrics), **self.code.line(), **self.standing}
            if self.guard.active:
                line["train/skipped"] = self.guard.skipped
            self.record.append(record.METRICS, line)
            at, nll = self.evaluated or (None, None)
            known = in_bits(self.standing, nll, self.bits_per_nat) | {"evaluated_at": at}
            known |= of_line(line) | self.tally.known()
            self.display.show(self.meter.view(step, line, known))

    def _is_bad(self, step: int, nll: float, norm: float, metrics: StepMetrics) -> bool:
        """Whether its update was left out.

        Raises:
            FloatingPointError: it was not, and is in the parameters, which must not be saved; or
                there are too many.
            _RollBack: the run goes on from an earlier state.
        """
        if metrics.bad is None:
            if math.isfinite(nll) and math.isfinite(norm):
                return False
            why = f"the train loss is {nll}, the gradient's norm {norm}"
            self._event("crash", step, why)
            raise FloatingPointError(f"step {step}: {why}")
        try:
            why = self.guard.read(step, nll, norm, bad=bool(metrics.bad))
        except BadStep as error:
            self._event("bad-steps", step, str(error))
            raise
        if why is None:
            return False
        self.health.look_closely(step)
        if self.config.guard.bad_step == "rollback":
            raise _RollBack(step, why)
        self._event("skip", step, f"{why}; its update is left out")
        return True

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
