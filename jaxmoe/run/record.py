"""The run directory: what a run leaves behind, in formats other tools may read.

One JSON object a line, appended and flushed at once. Only process 0 writes. On resume, metrics from
after the restored step are dropped (they come again, equal). Evals and the forecast register are
never rewritten, because forecasts were made from them: an eval that comes again and differs (on
another mesh) is a new line, and the later line of a step counts.
"""

import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from jaxmoe import config as config_lib
from jaxmoe.config import Config, MeshConfig, replace
from jaxmoe.errors import UserError
from jaxmoe.forecast.ladder_register import registered
from jaxmoe.forecast.pass_register import PASS_RATES
from jaxmoe.forecast.register import FORECASTS
from jaxmoe.outside import json_object, loads, needed, plain_name, reading

CONFIG, ENVIRONMENT, SCHEDULE = "config.json", "environment.json", "schedule.json"
METRICS, EVALS, EVENTS = "metrics.jsonl", "evals.jsonl", "events.jsonl"
LAYERS = "layers.jsonl"
CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer.json"
# What a line of each must have for anything to go on from it.
NEEDED: dict[str, dict[str, Any]] = {
    METRICS: {"step": int},
    EVALS: {"step": int, "set": str, "nll": (int, float, type(None))},
    EVENTS: {"step": int, "what": str},
    LAYERS: {"step": int, "arrays": dict},
    "faults.jsonl": {"fault": int, "of": str},
}
REGISTERS = [Path(FORECASTS), Path(PASS_RATES)]
FETCHING = "fetching"  # what comes from checkpoint.mirror, until it is whole
BEFORE_START = {f"{CONFIG}.tmp", FETCHING, FORECASTS, PASS_RATES} | {
    f.with_suffix(suffix).name for f in REGISTERS for suffix in (".head.json", ".head.tmp")
}


Tell = Callable[[str, int, str], None]  # of (what, step, why): an event
Line = Mapping[str, Any]


class Viewer(Protocol):
    """Shows the lines of the record elsewhere (run/viewers.py)."""

    def begin(self, standing: Sequence[tuple[str, Line]]) -> None:
        """A start of the run: (file, line) of what stands, rising by step."""
        ...

    def add(self, name: str, line: Line) -> None: ...

    def close(self, exit_code: int) -> None: ...


def now() -> str:
    """As events say it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


# Leaves that say how the same losses are computed: they change them by rounding alone.
COMPUTED = (
    *("model.remat", "model.loss_chunk", "model.attention_path", "model.context_attention"),
    *("model.expert_path", "model.expert_exchange", "optim.shard_over_replica"),
)


def recipe(config: Config) -> Config:
    """What a run is known by: all but the mesh, how often state is saved, what is watched over, how
    it is watched and what is rehearsed. To go on, less must be equal (`forbidden`)."""
    default = Config()
    return replace(
        config,
        name="",
        mesh=MeshConfig(),
        checkpoint=default.checkpoint,
        health=default.health,
        log=default.log,
        faults=(),
    )


def run_fingerprint(config: Config) -> str:
    """Of what decides a run's losses: all but its name, the mesh and how often it is saved."""
    return config_lib.fingerprint(recipe(config))


def forbidden(before: Config, now: Config) -> list[str]:
    """What keeps a run from going on by another config: `key: before -> now` of each leaf that
    decides losses by more than the rounding of another order of sums."""
    return config_lib.diff(_decisive(before), _decisive(now))


def _decisive(config: Config) -> Config:
    """The recipe without what says only how it is computed, which another machine may want
    otherwise."""
    router = config.model.router
    # Loads of one part, or noise drawn for it, are not those of the whole batch (RouterConfig).
    whole = router.load_balance_coef == 0 or router.load_balance_scope == "sequence"
    if config.model.n_experts == 1 or (whole and router.jitter == 0):
        ramp = tuple(replace(stage, accumulate=1) for stage in config.train.batch_ramp)
        config = replace(config, train=replace(config.train, accumulate=1, batch_ramp=ramp))
    for part, name in (key.split(".") for key in COMPUTED):
        plain = getattr(getattr(Config(), part), name)
        config = replace(config, **{part: replace(getattr(config, part), **{name: plain})})
    return recipe(config)


def run_dir(given: str | Path | None, config: Config) -> Path:
    """As given, or else runs/NAME.

    Raises:
        UserError: the config's name, which may come from anywhere, is not that of one folder.
    """
    if given:
        return Path(given)
    if not plain_name(config.name):
        raise UserError(
            f"name={config.name!r} is no name of a folder below runs/; give --run-dir DIR, or"
            " another --set name=NAME"
        )
    return Path("runs") / config.name


def check_directory(run_dir: Path, config: Config, resume: str) -> None:
    """Looks, and writes nothing.

    Raises:
        UserError: the directory holds another config's run or forecast, a run that `never` forbids
            to touch, no run where one `must` be, or something that is no run at all.
    """
    file = run_dir / CONFIG
    with reading(f"--run-dir {run_dir}", "give another"):
        there = file.exists()
    if not there:
        if resume == "must" and config.checkpoint.mirror is None:  # else run/bring.py asks there
            raise UserError(f"--resume must: {run_dir} holds no run")
        # Before config.json is there, nothing of ours is but what a kill left of writing it, and
        # a forecast from before the start: whatever else is there is somebody else's.
        if run_dir.exists() and (
            not run_dir.is_dir() or any(f.name not in BEFORE_START for f in run_dir.iterdir())
        ):
            raise UserError(f"{run_dir} holds something that is not a run; give another --run-dir")
        registered(run_dir / FORECASTS, run_fingerprint(config))
        return
    if resume == "never":
        raise UserError(f"--resume never: {run_dir} holds a run already; give another --run-dir")
    if differences := forbidden(read_config(run_dir), config):
        raise UserError(
            f"{run_dir} holds a run of a different config ({'; '.join(differences)});"
            " give another --run-dir"
        )


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Of the checkpoints that are there, rising; they need not be whole."""
    return sorted(int(f.name) for f in (run_dir / CHECKPOINTS).glob("*") if f.name.isdecimal())


def check_data(run_dir: Path, fingerprint: str) -> None:
    """Raises UserError if the run in the directory was trained on other data."""
    file = run_dir / ENVIRONMENT
    before = fingerprint
    if file.exists():
        with reading(file):
            before = json_object(file)["data"]["fingerprint"]
    if before != fingerprint:
        raise UserError(
            f"{run_dir}: the training data changed since this run began ({before} ->"
            f" {fingerprint}): losses would not be comparable; bring it back, or give another"
            " --run-dir"
        )


def finished(run_dir: Path) -> dict[str, Any] | None:
    """The final held-out result of a run that is done; None if it is not."""
    done = [event["step"] for event in read_lines(run_dir / EVENTS) if event["what"] == "done"]
    rows = [row for row in read_lines(run_dir / EVALS) if done and row["step"] == done[-1]]
    rows = [row for row in rows if row["set"] == rows[0]["set"]]  # what is forecast comes first
    return rows[-1] if rows else None


def read_config(run_dir: Path) -> Config:
    """The config a run was started (or last resumed) with."""
    file = run_dir / CONFIG
    try:
        return config_lib.from_json(json.dumps(loads(file.read_text())["config"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: not a run's config: {error}") from error


class RunRecord:
    """Writes the files of one run. With `writes=False` (all processes but one) it is silent."""

    def __init__(self, folder: Path, *, writes: bool, viewers: Sequence[Viewer] = ()) -> None:
        self.folder = folder
        self._writes = writes
        self._viewers = tuple(viewers) if writes else ()
        self._waiting: dict[str, bytes] = {}  # lines that could not be written, by file
        self._lock = threading.Lock()  # the watchdog and the mirror tell of events too

    def begin(self, config: Config) -> None:
        """Creates the directory, config.json first: its presence means that this is a run."""
        if self._writes:
            self.folder.mkdir(parents=True, exist_ok=True)
        tree = {"fingerprint": config_lib.fingerprint(config), "config": config_lib.as_dict(config)}
        self.write(CONFIG, tree)

    def write(self, name: str, tree: Mapping[str, Any]) -> None:
        """A whole JSON file, replaced at once."""
        if self._writes:
            _replace(self.folder / name, json.dumps(tree, indent=2) + "\n")

    def text(self, name: str, text: str) -> None:
        """A whole file, replaced at once."""
        if self._writes:
            _replace(self.folder / name, text)

    def update(self, name: str, tree: Mapping[str, Any]) -> None:
        """Adds keys to a JSON file."""
        if self._writes:
            file = self.folder / name
            self.write(name, {**(json_object(file) if file.exists() else {}), **tree})

    def append(self, name: str, line: Line) -> None:
        """Where there is no room, or no leave to write, lines wait for the next ones: a run does
        not end for its record."""
        if not self._writes:
            return
        with self._lock:
            self._append(name, json.dumps(line).encode() + b"\n")
            self._show(name, line)

    def _show(self, name: str, line: Line) -> None:
        for viewer in self._viewers:
            viewer.add(name, line)

    @contextmanager
    def viewing(self) -> Iterator[None]:
        """What is shown elsewhere ends with this, well or not."""
        code = 1
        try:
            yield
            code = 0
        finally:
            for viewer in self._viewers:
                viewer.close(code)

    def _append(self, name: str, line: bytes) -> None:
        text = self._waiting.pop(name, b"") + line
        try:
            _append(self.folder / name, text)
        except OSError as error:
            self._waiting[name] = text
            why = f"{self.folder / name}: {error.strerror}"
            print(f"{why}; its lines are kept until they can be written", file=sys.stderr)

    def check(self) -> None:
        """Raises UserError if lines still wait."""
        for name in self._waiting:
            raise UserError(f"{self.folder / name} could not be written; make room, run it again")

    def event(self, what: str, *, step: int, why: str) -> None:
        self.append(EVENTS, {"time": now(), "step": step, "what": what, "why": why})

    def read(self, name: str) -> list[dict[str, Any]]:
        """The lines of a file; a last line torn by a kill is left out."""
        return read_lines(self.folder / name)

    def mended(self, name: str) -> list[dict[str, Any]]:
        """The lines of a file to which lines will be added: one torn by a kill is cut off."""
        file = self.folder / name
        if self._writes and file.exists():
            text = file.read_bytes()
            os.truncate(file, text.rfind(b"\n") + 1)
        return self.read(name)

    def evaluated(self, line: Line) -> None:
        """Adds a held-out result, unless the same is there already."""
        if line not in standing_evals(self.read(EVALS)):
            self.append(EVALS, line)
        else:  # what is shown elsewhere was rewound
            with self._lock:
                self._show(EVALS, line)

    def rewind(self, step: int) -> None:
        """Drops metrics after `step`, and lines torn by a kill. What is shown elsewhere begins anew
        with what stands."""
        if not self._writes:
            return
        for name, last in ((METRICS, step), (LAYERS, step), (EVALS, None), (EVENTS, None)):
            kept = [k for k in self.read(name) if last is None or k["step"] <= last]
            if (self.folder / name).exists():
                _replace(self.folder / name, "".join(json.dumps(k) + "\n" for k in kept))
        if self._viewers:
            standing = self._standing(step)
            for viewer in self._viewers:
                viewer.begin(standing)

    def _standing(self, step: int) -> list[tuple[str, Line]]:
        """Of metrics, evals and events: those of the run's own past up to `step`, in its order.
        Events from before the last start at step 0 are of another past, as are those beyond `step`;
        at step 0 all come again."""
        if step == 0:
            return []
        events = self.read(EVENTS)
        begun = max((i for i, one in enumerate(events) if one["what"] == "start"), default=0)
        parts = (
            (EVALS, standing_evals(self.read(EVALS))),
            (METRICS, self.read(METRICS)),
            (EVENTS, events[begun:]),
        )
        lines = [(name, line) for name, own in parts for line in own if line["step"] <= step]
        return sorted(lines, key=lambda one: one[1]["step"])


def standing_evals(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line stands for its step until one of its set and an earlier or the same step follows."""
    standing: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        before = standing.get(row["set"], [])
        standing[row["set"]] = [k for k in before if k["step"] < row["step"]] + [row]
    return [row for of_set in standing.values() for row in of_set]


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file; [] if it is missing, a torn last line is left out.

    Raises:
        UserError: a line is no JSON object, or not what a file of this name holds; it is named.
    """
    if not file.exists():
        return []
    with reading(file):
        whole, _, _ = file.read_bytes().rpartition(b"\n")
    rows = []
    for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
        where = f"{file}, line {number}"
        with reading(where):
            row = loads(line)
        if not isinstance(row, dict):
            raise UserError(f"{where}: it holds {type(row).__name__}, not an object; mend the line")
        needed(row, NEEDED.get(file.name, {}), where)
        rows.append(row)
    return rows


def _append(file: Path, text: bytes) -> None:
    """All of it or, with an OSError, nothing."""
    with open(file, "ab", buffering=0) as out:
        size = out.seek(0, os.SEEK_END)
        try:
            while text:
                text = text[out.write(text) :]
        except OSError:
            out.truncate(size)
            raise


def _replace(file: Path, text: str) -> None:
    temporary = file.with_name(file.name + ".tmp")
    with open(temporary, "w") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, file)
