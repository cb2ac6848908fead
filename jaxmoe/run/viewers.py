"""The record for the tools that others watch runs by: TensorBoard and Weights & Biases.

Both are made from the lines of the record and know nothing besides. Each start of a run writes all
that stands anew, then each line as it comes. So no point is left of steps that were rolled back,
none is missing that a kill or a full disk has cost, and a run that is resumed with a tool it did
not have before shows its whole past there.
"""

import importlib
import importlib.util
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from jaxmoe import config as config_lib
from jaxmoe.config import Config
from jaxmoe.config_run import LogConfig
from jaxmoe.errors import UserError
from jaxmoe.run.record import EVALS, EVENTS, METRICS, Line, Viewer

TENSORBOARD, WANDB = "tensorboard", "wandb"  # folders of the run directory, and extras
SHOWN = (METRICS, EVALS, EVENTS)

BINS = 16  # of a histogram
Point = float | list[float] | str  # a scalar, values for a histogram, words


def check(log: LogConfig) -> None:
    """Raises UserError if a package is missing that the config asks for."""
    for key, value, module, extra in (
        ("tensorboard", log.tensorboard, "tensorboardX", TENSORBOARD),
        ("wandb", log.wandb, "wandb", WANDB),
    ):
        if value and importlib.util.find_spec(module) is None:
            raise UserError(
                f"log.{key}={value} needs the package {module}, which is not installed:"
                f" pip install 'jaxmoe[{extra}]'"
            )


def viewers(config: Config, folder: Path) -> list[Viewer]:
    """Those that the config asks for, of the run in `folder`."""
    made: list[Viewer] = []
    if config.log.tensorboard:
        made.append(TensorBoard(folder / TENSORBOARD))
    if config.log.wandb is not None:
        made.append(Wandb(config, folder))
    return made


def points(name: str, line: Line) -> Iterator[tuple[str, Point]]:
    """What a line of a file shows, by name. Values by layer (or MTP module) are a scalar each,
    those by layer and expert a histogram a layer; layers count from 0, of those with experts."""
    if name == EVENTS:
        yield f"events/{line['what']}", line["why"]
        return
    prefix = f"eval/{line['set']}/" if name == EVALS else ""
    for key, value in line.items():
        if key != "step":
            yield from _flat(f"{prefix}{key}", value)


def _flat(key: str, value: Any) -> Iterator[tuple[str, Point]]:
    """Words (of a set's name) and what is not known yet are no points."""
    if isinstance(value, dict):
        for part, inner in value.items():
            yield from _flat(f"{key}/{part}", inner)
    elif isinstance(value, list) and key != "moe/load":
        for i, inner in enumerate(value):
            yield from _flat(f"{key}/{i:02}", inner)
    elif isinstance(value, list):
        yield from ((f"{key}/{i:02}", list(map(float, row))) for i, row in enumerate(value))
    elif isinstance(value, int | float):
        yield key, float(value)


class TensorBoard:
    """One event file of the run. Scalars are float32 there, as TensorBoard reads them; the time of
    a point is the run's own, from its start on, without the pauses between starts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None
        self._began = self._time = 0.0  # seconds since 1970

    def begin(self, standing: Sequence[tuple[str, Line]]) -> None:
        from tensorboardX.event_file_writer import EventsWriter

        event_pb2 = _protos("event")

        self.close(0)
        starts = [line["time"] for _, line in standing if line.get("what") == "start"]
        self._began = _seconds(starts[0]) if starts else time.time()
        self._time = self._began
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for old in self._folder.glob("events.out.tfevents.*"):
                old.unlink()
            self._writer = EventsWriter(str(self._folder / "events"))
            # Where copies of older files lie beside this one, their points are not shown.
            session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            event = event_pb2.Event(wall_time=self._began, step=0, session_log=session)
            self._writer.write_event(event)
            for name, line in standing:
                self._write(name, line)
            self._writer.flush()
        except OSError as error:
            self._give_up(error)

    def add(self, name: str, line: Line) -> None:
        if self._writer is None or name not in SHOWN:
            return
        try:
            self._write(name, line)
            self._writer.flush()
        except OSError as error:
            self._give_up(error)

    def close(self, exit_code: int) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _write(self, name: str, line: Line) -> None:
        from tensorboardX import summary

        event_pb2, summary_pb2 = _protos("event"), _protos("summary")
        if "seconds" in line:
            self._time = self._began + line["seconds"]
        found = summary_pb2.Summary()
        for tag, value in points(name, line):
            if isinstance(value, str):
                found.MergeFrom(summary.text(tag, value))
            elif isinstance(value, list):
                found.MergeFrom(summary.histogram(tag, value, bins=BINS))
            else:
                found.value.add(tag=tag, simple_value=value)
        at = _seconds(line["time"]) if "time" in line else self._time
        event = event_pb2.Event(wall_time=at, step=line["step"], summary=found)
        self._writer.write_event(event)

    def _give_up(self, error: OSError) -> None:
        """A run does not end for it, and its next start writes all of it."""
        writer, self._writer = self._writer, None
        with suppress(OSError):
            if writer is not None:
                writer.close()
        why = f"{self._folder}: {error.strerror}"
        print(f"{why}; TensorBoard's file ends here, until the next start", file=sys.stderr)


class Wandb:
    """A run of Weights & Biases for each start, whole from step 0; those of one run directory are
    one group. Offline, in the run directory, where WANDB_MODE does not say otherwise."""

    def __init__(self, config: Config, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._run: Any = None
        self._last = 0

    def begin(self, standing: Sequence[tuple[str, Line]]) -> None:
        """Raises UserError where it cannot begin: for one, online and without a key."""
        import wandb

        self.close(0)
        mode: Any = os.environ.get("WANDB_MODE") or "offline"  # one of its words, or its error
        resumed = sum(line.get("what") == "resume" for _, line in standing)
        try:
            self._run = wandb.init(
                project=self._config.log.wandb,
                name=f"{self._config.name}-{resumed}" if resumed else self._config.name,
                group=self._folder.resolve().name,
                dir=str(self._folder),
                mode=mode,
                config=config_lib.as_dict(self._config),
                reinit="create_new",
                # What is printed, the code and its repository are not its business.
                settings=wandb.Settings(console="off", silent=True, disable_git=True),
            )
        except wandb.Error as error:
            raise UserError(f"log.wandb={self._config.log.wandb}: {error}") from error
        self._last = 0
        for name, line in standing:
            self.add(name, line)

    def add(self, name: str, line: Line) -> None:
        if self._run is None or name not in SHOWN:
            return
        import wandb

        # Its rows come by rising steps; an event may be told a step late.
        self._last = max(self._last, line["step"])
        row = {
            tag: wandb.Histogram(value, num_bins=BINS) if isinstance(value, list) else value
            for tag, value in points(name, line)
        }
        self._run.log(row, step=self._last)

    def close(self, exit_code: int) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.finish(exit_code=exit_code)


def _protos(name: str) -> Any:
    """A module of tensorboardX whose classes are made at run time."""
    return importlib.import_module(f"tensorboardX.proto.{name}_pb2")


def _seconds(time_of_event: str) -> float:
    """Since 1970."""
    return datetime.fromisoformat(time_of_event).timestamp()
