"""What lies at a mirror (mirror.py): copies of checkpoints, each with the run's record of its time.

    run.json                        whose they are: run, start, time, config
    checkpoints/STEP/files/NAME     a file as it is; one of more than PART bytes lies in pieces,
                                    NAME.part-00000 and so on
    checkpoints/STEP/record-N/NAME
    whole/STEP.json                 written last: size, pieces and SHA-256 of each file
    broken/STEP.json                instead of that, once a file was not as this says

Without its file in whole/ a copy is none. Nothing but tensorstore is needed to write it, and to
read it `cat NAME.part-*` suffices.
"""

import hashlib
import json
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import tenacity

from jaxmoe import stores

__all__ = ["Broken", "Copies", "Stopped", "Unreachable"]

PART = 64 << 20  # bytes of a request
FLIGHT = 4  # requests at once: of the host's memory so many parts, and what tensorstore holds
TRIES = 6
FIRST_WAIT, LONGEST_WAIT, JITTER = 1.0, 60.0, 0.5  # seconds; doubled after each try
PATIENCE = 600.0  # seconds for one request: 0.1 MB/s

RUN = "run.json"

Request = tuple[str, Callable[[], Any]]  # what it is of, and how a future of it is had
Entries = dict[str, dict[str, Any]]  # by name: size, parts, sha256


class Unreachable(Exception):
    """A request failed however often it was made; in one line."""


class Broken(Exception):
    """A copy is not as it was written; in one line."""


class Stopped(Exception):
    """Nobody waits for it any more."""


class Copies:
    """Those at one place. A request that fails is made again, TRIES times in all, with growing
    waits; then it raises `Unreachable`, or `Stopped` where `stopped` is set meanwhile."""

    def __init__(self, place: str, stopped: threading.Event | None = None) -> None:
        """Raises UserError: no store can have such a place."""
        self.place = place
        self._store = stores.opened(place, stores.SHORT)
        self._stopped = stopped or threading.Event()
        self._retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(TRIES) | tenacity.stop_when_event_set(self._stopped),
            wait=tenacity.wait_exponential(multiplier=FIRST_WAIT, max=LONGEST_WAIT)
            + tenacity.wait_random(0, JITTER),
            sleep=tenacity.sleep_using_event(self._stopped),
            reraise=True,
        )

    # Whose they are, and which are whole

    def run(self) -> dict[str, Any] | None:
        """Of whom the copies are; None: nobody has written there. Raises Broken."""
        return self._json(RUN)

    def take(self, owner: Mapping[str, Any]) -> None:
        self._write(RUN, _text(owner))

    def probe(self) -> None:
        """Whether anything can be written."""
        self._write("probe", b"")
        self._write("probe", None)

    def steps(self) -> list[int]:
        """Of the whole ones, rising."""
        names = (name.partition(".")[0] for name in self._names("whole/"))
        return sorted(int(name) for name in names if name.isdigit())

    def index(self, step: int) -> dict[str, Any]:
        """What `seal` wrote. Raises Broken."""
        found = self._json(f"whole/{step}.json")
        if found is None:
            raise Broken(f"whole/{step}.json is missing")
        return found

    def seal(self, step: int, index: Mapping[str, Any]) -> None:
        """All of its files are there."""
        self._write(f"whole/{step}.json", _text(index))

    def unseal(self, step: int, *, broken: bool = False) -> None:
        """It counts no more. `broken`: its files stay until the step is copied again."""
        if broken:
            found = self._ask(f"whole/{step}.json", partial(self._store.read, f"whole/{step}.json"))
            self._write(f"broken/{step}.json", found.value)
        self._write(f"whole/{step}.json", None)

    def clear(self, step: int) -> None:
        """Deletes all files of a step, those of a cut copy too."""
        self._write(f"broken/{step}.json", None)
        self.delete(f"checkpoints/{step}/")

    def cut(self) -> list[int]:
        """Steps of which there are files, that are neither whole nor set aside as broken."""
        there = {int(n.partition("/")[0]) for n in self._names("checkpoints/") if n[0].isdigit()}
        broken = {int(name.partition(".")[0]) for name in self._names("broken/")}
        return sorted(there - broken - {*self.steps()})

    def delete(self, folder: str) -> None:
        what = partial(self._store.delete_range, stores.key_range(folder))
        self._ask(folder, what)

    # Files

    def put(self, folder: str, files: Mapping[str, Path]) -> Entries:
        """Copies files there, by name.

        Raises:
            FileNotFoundError: one is gone.
        """
        entries: Entries = {}
        for _ in self._under_way(self._writes(folder, files, entries)):
            pass
        return entries

    def get(self, folder: str, entries: Mapping[str, Mapping[str, Any]], into: Path) -> None:
        """Brings files from there.

        Raises:
            Broken: one is missing, or not as it was written; the rest was not brought.
        """
        parts = [(name, n) for name, one in entries.items() for n in range(one["parts"])]
        keys = (_key(folder, name, n, entries[name]["parts"]) for name, n in parts)
        asked = self._under_way((key, partial(self._store.read, key)) for key in keys)
        sha256 = hashlib.sha256()
        for (name, n), found in zip(parts, asked, strict=True):
            file = into / name
            if not file.resolve().is_relative_to(into.resolve()):
                raise Broken(f"{name} is no name of a file")
            if found.state == "missing":
                raise Broken(f"{name} is missing")
            if n == 0:
                file.parent.mkdir(parents=True, exist_ok=True)
                sha256 = hashlib.sha256()
            with open(file, "ab" if n else "wb") as out:
                out.write(found.value)
            sha256.update(found.value)
            last = n + 1 == entries[name]["parts"]
            if last and sha256.hexdigest() != entries[name]["sha256"]:
                raise Broken(f"{name} has changed: its SHA-256 is {sha256.hexdigest()[:12]}")

    def _writes(self, folder: str, files: Mapping[str, Path], told: Entries) -> Iterator[Request]:
        """Fills `told` as it goes."""
        for name, file in files.items():
            size, sha256 = file.stat().st_size, hashlib.sha256()
            count = max(1, -(-size // PART))
            with open(file, "rb") as stream:
                for n in range(count):
                    part = stream.read(PART)
                    sha256.update(part)
                    key = _key(folder, name, n, count)
                    yield key, partial(self._store.write, key, part)
            told[name] = {"size": size, "parts": count, "sha256": sha256.hexdigest()}

    # Requests

    def _under_way(self, requests: Iterable[Request]) -> Iterator[Any]:
        """Their results in order; FLIGHT of them are begun at a time."""
        begun: deque[tuple[str, Callable[[], Any], Any]] = deque()
        for what, ask in requests:
            if self._stopped.is_set():
                raise Stopped
            try:
                future = ask()
            except Exception:  # whatever it is, it comes again when the result is asked for
                future = None
            begun.append((what, ask, future))
            if len(begun) == FLIGHT:
                yield self._ask(*begun.popleft())
        while begun:
            yield self._ask(*begun.popleft())

    def _ask(self, what: str, ask: Callable[[], Any], begun: Any = None) -> Any:
        """The result of a request, which may have been begun."""

        def once() -> Any:
            nonlocal begun
            future, begun = begun if begun is not None else ask(), None
            return future.result(timeout=PATIENCE)

        try:
            return self._retrying(once)
        except Exception as error:  # whatever the storage layers raise
            if self._stopped.is_set():
                raise Stopped from None
            raise Unreachable(f"{what}: {stores.said(error)}") from None

    def _write(self, key: str, value: bytes | None) -> None:
        """None deletes."""
        self._ask(key, partial(self._store.write, key, value))

    def _names(self, folder: str) -> list[str]:
        """Below a folder."""
        listed = partial(self._store.list, stores.key_range(folder), len(folder))
        return [name.decode() for name in self._ask(folder, listed)]

    def _json(self, key: str) -> dict[str, Any] | None:
        found = self._ask(key, partial(self._store.read, key))
        if found.state == "missing":
            return None
        try:
            value = json.loads(found.value)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise Broken(f"{key} is not a JSON object")
        return value


def _key(folder: str, name: str, n: int, count: int) -> str:
    """Of a piece."""
    return f"{folder}{name}" if count == 1 else f"{folder}{name}.part-{n:05}"


def _text(tree: Mapping[str, Any]) -> bytes:
    return json.dumps(tree, indent=1).encode()
