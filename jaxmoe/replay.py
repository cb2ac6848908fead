"""`python -m jaxmoe.replay RUN --step N`: one step of a run again, to tell a bug from a machine.

The state before the step is made from the newest checkpoint before it, with the run's own data and
draws; then the step is taken twice, and once with every device in its neighbour's place. Nothing is
written.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from jaxmoe import config as config_lib
from jaxmoe import exits
from jaxmoe import mesh as mesh_lib
from jaxmoe.config_check import check
from jaxmoe.curriculum import curriculum
from jaxmoe.data.opened import open_corpus
from jaxmoe.errors import UserError
from jaxmoe.outside import json_object, needed
from jaxmoe.run import platform, record
from jaxmoe.run.again import (
    Difference,
    Snapshot,
    checkpoint_before,
    differences,
    restore,
    rolled,
)
from jaxmoe.run.loop import Trainer
from jaxmoe.run.meta import read as read_meta
from jaxmoe.run.progress import Silent
from jaxmoe.run.state import abstract_state, relaid, state_as_saved

SHOWN = 8  # differences
ROUNDING = 1e-5  # on another mesh than the run's, losses agree so far

EXAMPLES = """examples:
  python -m jaxmoe.replay runs/mine --step 1204            what an alarm named
  python -m jaxmoe.replay runs/mine --step 1204 --json

exit codes: 0 replays agree, and the record where it has the steps, 1 something differs, 2 a mistake
in what was asked"""

Bend = Callable[[str, Any], Any]


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What came of it. Losses in nats per token.

    Attributes:
        began: the checkpoint's step.
        recorded: the loss and the gradient's norm in the run's metrics; None where that step was
            not logged. replayed: ours. crashed: whether the run ended here, by a number that is
            not finite.
        compared: recorded steps from the checkpoint to this one; first_unlike: the first of them
            that the replay does not give.
        same_mesh: whether the run had this mesh in one process, so that losses are compared bit
            for bit.
        twice, elsewhere: differences of the new state; elsewhere is None with a single device.
    """

    step: int
    began: int
    recorded: tuple[float, float] | None
    crashed: bool
    replayed: tuple[float, float]
    compared: int
    first_unlike: int | None
    same_mesh: bool
    twice: list[Difference]
    elsewhere: list[Difference] | None

    @property
    def verdict(self) -> str:
        if self.twice:
            return "non-deterministic"
        if self.elsewhere:
            return "device-bound"
        if self.first_unlike is not None:
            return "not repeated"
        return "deterministic" if self.compared else "unrecorded"

    @property
    def meaning(self) -> str:
        """The verdict for a person, with what to do."""
        return MEANINGS[self.verdict]


MEANINGS = {
    "deterministic": "the same bits each time, on other devices, and in the record: what happened"
    " is in the program or the data; look at the batch with python -m jaxmoe.data inspect",
    "non-deterministic": "the same devices gave other bits the second time: a race, or hardware"
    " that errs now and then; repeat it, and test the devices named below",
    "device-bound": "other devices give other bits: one of those named below computes wrongly;"
    " take it out and resume from the checkpoint before",
    "unrecorded": "the same bits each time and on other devices; but the run logged no step between"
    " the checkpoint and this one, so nobody knows whether they are the run's: take a logged step",
    "not repeated": "the replay repeats itself but not the record: the run's own devices erred"
    " then, or code, libraries or data changed since; resume from the checkpoint before the step"
    " that differs first",
}


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        found = replay(args.run, args.step)
    except UserError as error:
        print(f"jaxmoe.replay: {error}", file=sys.stderr)
        return exits.MISTAKE
    if args.json:
        told = dataclasses.asdict(found)
        told |= {"verdict": found.verdict, "meaning": found.meaning}
        print(json.dumps(told))
    else:
        _show(found)
    return exits.DONE if found.verdict in ("deterministic", "unrecorded") else exits.FAULT


def replay(run_dir: Path, step: int, bend: Bend | None = None) -> Replay:
    """The step'th update of a run (the first is 1), again.

    Args:
        bend: of ("first" | "again" | "elsewhere", the new state), a state: to rehearse a fault.

    Raises:
        UserError: no run, no checkpoint before the step, other data, or too few devices.
    """
    config = record.read_config(run_dir)
    check(config)
    if not 1 <= step <= config.train.steps:
        raise UserError(f"--step {step}: the run has steps 1 to {config.train.steps}")
    checkpoint = checkpoint_before(run_dir, step - 1)
    meta = read_meta(checkpoint)
    platform.start(config)
    if jax.process_count() > 1:
        raise UserError("replay runs in one process; emulate the mesh, or give it all devices")
    mesh = mesh_lib.build(config.mesh)
    corpus = open_corpus(config, lambda *_: None)
    record.check_data(run_dir, corpus.fingerprint)
    bend = bend or (lambda _, state: state)
    losses: dict[int, float] = {}
    skipped = left_out(run_dir, int(checkpoint.name), step)

    def trainer(on: Mesh) -> Trainer:
        own = Trainer(config, on, corpus, run_dir, Silent(), math.inf, writes=False)
        own.guard.replay(skipped)
        return own

    def take(own: Trainer, state: Any, number: int) -> tuple[Any, tuple[float, float]]:
        """Update `number` from the state before it, which is used up."""
        own.tokens = curriculum(config).tokens(number - 1)
        state, metrics = own.take(state, own.next_batch())
        sums = jax.device_get(metrics.sums)
        losses[number] = float(sums.nll / sums.weight)
        return state, (losses[number], float(metrics.grad_norm))

    with jax.set_mesh(mesh):
        own = trainer(mesh)
        abstract = abstract_state(config, mesh)
        saved = meta["config"]["mesh"]
        rounds = saved.get("rounds", 1)
        state = restore(checkpoint, state_as_saved(config, mesh, rounds))
        if rounds != config.mesh.rounds:
            state = relaid(state, abstract)
        began = int(state.step)
        for number in range(began + 1, step):
            state, _ = take(own, state, number)
        before = Snapshot.of(state)
        new, replayed = take(own, state, step)
        first = Snapshot.of(bend("first", new))
        new, _ = take(own, before.put(abstract), step)
        twice = [*differences(first, Snapshot.of(bend("again", new)))]
    elsewhere = None
    if mesh.size > 1:
        other = rolled(mesh)
        with jax.set_mesh(other):
            new, _ = take(trainer(other), before.put(abstract_state(config, other)), step)
            elsewhere = [*differences(first, Snapshot.of(bend("elsewhere", new)))]
    told = json_object(run_dir / record.ENVIRONMENT)
    alike = told.get("mesh") == dict(mesh.shape) and "processes" not in str(told.get("devices"))
    alike = alike and saved == config_lib.as_dict(config)["mesh"]
    row, crashed, compared, unlike = _compared(run_dir, losses, replayed, step, same_mesh=alike)
    return Replay(
        step=step,
        began=began,
        recorded=row,
        crashed=crashed,
        replayed=replayed,
        compared=compared,
        first_unlike=unlike,
        same_mesh=alike,
        twice=twice,
        elsewhere=elsewhere,
    )


def left_out(run_dir: Path, began: int, step: int) -> set[int]:
    """Updates that the guard left out on the way from a checkpoint to a step.

    Raises:
        UserError: the way was rolled back to between them, which only a checkpoint of there knows.
    """
    skipped: set[int] = set()
    for event in record.read_lines(run_dir / record.EVENTS):
        if event["what"] == "resume":  # what came after is done again
            skipped = {one for one in skipped if one <= event["step"]}
        elif event["what"] == "skip":
            skipped.add(event["step"])
        elif event["what"] == "rollback" and began < event["step"] < step:
            raise UserError(
                f"--step {step}: the run rolled back at step {event['step']}, and the newest whole"
                f" checkpoint before is of step {began}: give a step up to {event['step']}"
            )
    return skipped


def _compared(
    run_dir: Path,
    losses: dict[int, float],
    replayed: tuple[float, float],
    step: int,
    *,
    same_mesh: bool,
) -> tuple[tuple[float, float] | None, bool, int, int | None]:
    """What the run recorded of the step, whether it crashed there, how many steps were compared,
    and the first that is not as replayed."""
    rows = {row["step"]: row for row in record.read_lines(run_dir / record.METRICS)}
    for number in losses.keys() & rows.keys():
        numbers = {"train/nll": (int, float), "train/grad_norm": (int, float)}
        needed(rows[number], numbers, f"{run_dir / record.METRICS}, step {number}")
    close = 0.0 if same_mesh else ROUNDING
    alike = {
        n: math.isclose(rows[n]["train/nll"], losses[n], rel_tol=close)
        for n in sorted(losses)
        if n in rows
    }
    events = record.read_lines(run_dir / record.EVENTS)
    crashed = any(one["what"] == "crash" and one["step"] == step for one in events)
    if crashed:  # such a step has no line
        alike[step] = not all(map(math.isfinite, replayed))
    row = rows.get(step)
    told = None if row is None else (row["train/nll"], row["train/grad_norm"])
    return told, crashed, len(alike), next((n for n, same in alike.items() if not same), None)


def _show(found: Replay) -> None:
    out = Console(highlight=False, soft_wrap=True)
    loss, norm = found.replayed
    out.print(f"step {found.step}, from checkpoint {found.began}: loss {loss!r}, gradient {norm!r}")
    if found.crashed:
        out.print("recorded: the run ended here, its loss or gradient was not finite")
    elif found.recorded is None:
        out.print("recorded: this step was not logged (train.log_every)")
    else:
        out.print(f"recorded: loss {found.recorded[0]!r}, gradient {found.recorded[1]!r}")
    if not found.same_mesh:
        out.print(f"the run had another mesh: losses are compared to {ROUNDING:g}")
    if found.first_unlike is not None:
        out.print(f"the record differs first at step {found.first_unlike}")
    out.print(f"twice on the same devices: {_said(found.twice)}")
    elsewhere = found.elsewhere
    told = "there is but one device" if elsewhere is None else _said(elsewhere)
    out.print(f"every device in its neighbour's place: {told}")
    for one in [*found.twice, *(found.elsewhere or [])][:SHOWN]:
        out.print(f"  {one}")
    out.print(f"{found.verdict}: {found.meaning}")


def _said(found: Sequence[Difference]) -> str:
    if not found:
        return "the same bits"
    names = {one.name for one in found}
    return f"{len(found)} parts of {len(names)} arrays differ"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxmoe.replay",
        description="Takes one step of a run again: is it the program, the data or the machine?",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, with checkpoints")
    parser.add_argument("--step", type=int, required=True, metavar="N", help="the update, from 1")
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")
    return parser


if __name__ == "__main__":
    sys.exit(main())
