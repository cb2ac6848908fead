"""A mix that is read from afar: rows at the same time, and those of the next steps in advance.

What a step reads is known without running it, so nothing is read that is not fed, but for the steps
that were under way when a run was stopped.
"""

import threading
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

from jaxmoe.config import Config
from jaxmoe.curriculum import curriculum
from jaxmoe.data.loader import Packed, Rows
from jaxmoe.data.mixture import Mixture
from jaxmoe.data.store import Source

__all__ = ["Ahead"]

STEPS = 2  # read before their turn
_READERS = 32  # as many requests as tensorstore sends at once (http_request_concurrency)


class Ahead(Mixture):
    """The same rows as a `Mixture` of the same sources."""

    def __init__(
        self, config: Config, sources: Mapping[str, Source], specials: Mapping[str, int]
    ) -> None:
        super().__init__(config, sources, specials)
        self._steps = curriculum(config)
        self._last = config.train.steps
        self._lock = threading.Lock()
        self._coming: dict[tuple[int, int, int], Future[Rows | Packed]] = {}
        # Two pools: a step waits for its rows, and must not take the place of one.
        self._readers = _Threads(_READERS)
        self._drawers = _Threads(STEPS + 1)

    def rows(self, step: int, start: int, stop: int) -> Rows | Packed:
        size = self._steps.at(step).shape.batch
        with self._lock:
            self._coming = {key: due for key, due in self._coming.items() if key[0] >= step}
            found = self._due(step, start, stop)
            for later in range(step + 1, min(step + 1 + STEPS, self._last)):
                if self._steps.at(later).shape.batch == size:  # else others are this process's rows
                    self._due(later, start, stop)
        return found.result()

    def _due(self, step: int, start: int, stop: int) -> "Future[Rows | Packed]":
        key = step, start, stop
        if key not in self._coming:
            self._coming[key] = self._drawers.submit(super().rows, *key)
        return self._coming[key]

    def _each(self, fill: Callable[..., None], *rows: Any) -> None:
        for due in [self._readers.submit(fill, *row) for row in zip(*rows, strict=True)]:
            due.result()


class _Threads:
    """Threads that end with this object. Unlike those of a ThreadPoolExecutor they do not keep the
    interpreter from ending while a store that is gone is asked again, for minutes."""

    def __init__(self, count: int) -> None:
        self._tasks: SimpleQueue[Any] = SimpleQueue()
        for _ in range(count):
            threading.Thread(target=_work, args=(self._tasks,), daemon=True).start()
        weakref.finalize(self, _end, self._tasks, count)

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        due: Future[Any] = Future()
        self._tasks.put((due, function, args))
        return due


def _work(tasks: "SimpleQueue[Any]") -> None:
    while (task := tasks.get()) is not None:
        due, function, args = task
        try:
            due.set_result(function(*args))
        except BaseException as error:
            due.set_exception(error)
        del task, due, function, args  # they hold the stream, which could not end


def _end(tasks: "SimpleQueue[Any]", count: int) -> None:
    for _ in range(count):
        tasks.put(None)
