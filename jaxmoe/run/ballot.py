"""Processes that save together: each says whether its part went well, and all end alike.

The barriers of the storage library know only who has come. A process whose disk is full never
comes, and the others would wait out a deadline of many minutes; here it says so, and all hear it.
Words go through the coordination service, so a ballot may be held in any thread, beside a step.
"""

import itertools
import time
from typing import Any

import jax
from orbax.checkpoint.multihost import get_barrier_sync_fn

from jaxmoe.jax_versions import coordination_client

__all__ = ["Ballot", "Outvoted"]

READY, WRITTEN, COMMITTED = "ready", "written", "committed"
# What orbax calls them (async_checkpointer.py); tests/run/test_failed_saves.py holds it to that.
VOTES = {WRITTEN: "async_write_complete", COMMITTED: "async_commit_complete"}
NOTHING = "-"  # went wrong; the store takes no empty values
FIRST, SLOWEST = 0.01, 0.5  # seconds between looks at who has spoken, growing

_numbers = itertools.count()  # all processes make the same ballots in the same order


class Outvoted(OSError):
    """A process, named in the text, could not do its part."""


class Ballot:
    """One vote after another on saves; with one process its own word is all there is."""

    def __init__(self) -> None:
        self._name = f"jaxmoe/ballot-{next(_numbers)}"
        self._rank, self._n = jax.process_index(), jax.process_count()
        self._save = 0
        self._said: set[str] = set()  # phases that this process has spoken in
        self._concluded: set[str] = set()  # and those that process 0 has counted

    def begin(self) -> None:
        """The next save."""
        self._save += 1
        self._said, self._concluded = set(), set()
        if self._n > 1 and self._rank == 0 and self._save > 2:  # nobody waits for those any more
            self._client.key_value_delete(f"{self._name}/{self._save - 2}/")

    def ready(self, problem: str | None, seconds: float) -> None:
        """Before anything is written.

        Raises:
            Outvoted: a process has a problem.
        """
        self._agree(READY, problem or "", seconds)

    def barrier(self, *, key: str, timeout_ms: int) -> None:
        """As orbax wants one. Two of its barriers are votes: the one where this process's part is
        written, and the one where process 0 has given the checkpoint its name.

        Raises:
            Outvoted: a process failed before.
        """
        for phase, name in VOTES.items():
            if name in key:
                return self._agree(phase, "", timeout_ms / 1000)
        return get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

    def fail(self, problem: str) -> None:
        """This process comes to none of the barriers that are left of this save."""
        for phase in (WRITTEN, COMMITTED):
            self._say(phase, problem)
            if self._rank == 0:
                self._conclude(phase, _by(0, problem))

    def _conclude(self, phase: str, verdict: str) -> None:
        if self._n > 1 and phase not in self._concluded:
            self._concluded.add(phase)
            self._client.key_value_set(self._verdict(phase), verdict or NOTHING)

    def _agree(self, phase: str, problem: str, seconds: float) -> None:
        self._say(phase, problem)
        verdict = _by(self._rank, problem) if problem else ""
        if self._n > 1:
            if self._rank == 0:
                verdict = self._counted(phase, seconds)
                self._conclude(phase, verdict)
            else:
                wait = int(1000 * seconds)
                told = self._client.blocking_key_value_get(self._verdict(phase), wait)
                verdict = told if told != NOTHING else ""
        if verdict:
            raise Outvoted(verdict)

    def _counted(self, phase: str, seconds: float) -> str:
        """What process 0 hears: the first problem, or nothing once all have spoken."""
        end, pause = time.monotonic() + seconds, FIRST
        while True:
            words = self._client.key_value_dir_get(self._key(phase, ""))
            for key, problem in words:
                if problem != NOTHING:
                    return _by(int(key.rpartition("/")[2]), problem)
            if len(words) == self._n:
                return ""
            if time.monotonic() > end:
                spoken = {int(key.rpartition("/")[2]) for key, _ in words}
                silent = min(set(range(self._n)) - spoken)
                return f"process {silent} did not answer within {seconds:g} s"
            time.sleep(pause)
            pause = min(2 * pause, SLOWEST)

    def _say(self, phase: str, problem: str) -> None:
        if self._n > 1 and phase not in self._said:
            self._said.add(phase)
            self._client.key_value_set(self._key(phase, str(self._rank)), problem or NOTHING)

    def _verdict(self, phase: str) -> str:
        return f"{self._name}/{self._save}/{phase}-verdict"

    def _key(self, phase: str, who: str) -> str:
        return f"{self._name}/{self._save}/{phase}/{who}"

    @property
    def _client(self) -> Any:
        return coordination_client()


def _by(rank: int, problem: str) -> str:
    return problem if jax.process_count() == 1 else f"process {rank}: {problem}"
