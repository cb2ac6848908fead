"""What each step of a run consumes: batch size, sequence length and phase of the mix, as functions
of the tokens consumed before it. All of them change between steps, never within one.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from jaxmoe.config import Config, replace

__all__ = ["Curriculum", "Shape", "Stretch", "curriculum", "shaped"]


@dataclass(frozen=True)
class Shape:
    """Of a step: each is compiled once."""

    batch: int  # sequences
    length: int  # tokens of a sequence
    accumulate: int  # parts that the batch is computed in

    @property
    def tokens(self) -> int:
        return self.batch * self.length


@dataclass(frozen=True)
class Stretch:
    """Consecutive steps of one shape and one phase."""

    step: int  # the first; steps count from 0 here
    steps: int
    tokens: int  # consumed before it
    sequences: int  # consumed before it
    shape: Shape
    phase: int  # 0: the weights of data.sources; k: data.phases[k - 1]


class Curriculum:
    """The stretches of a run, and sums over them. Python integers: tokens overflow int32."""

    def __init__(self, config: Config) -> None:
        self.stretches = tuple(_stretches(config))
        self._first = [stretch.step for stretch in self.stretches]
        self._tokens = [stretch.tokens for stretch in self.stretches]
        self.largest = max(s.shape.tokens for s in self.stretches)  # tokens of a step

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Each that occurs, in the order of their first steps."""
        return tuple(dict.fromkeys(stretch.shape for stretch in self.stretches))

    @property
    def steps(self) -> int:
        return self.stretches[-1].step + self.stretches[-1].steps

    def at(self, step: int) -> Stretch:
        """Of the step with index `step`, from 0; beyond the run the last one goes on."""
        return self.stretches[max(0, bisect_right(self._first, step) - 1)]

    def tokens(self, step: int) -> int:
        """Consumed by the first `step` steps."""
        stretch = self.at(step)
        return stretch.tokens + (step - stretch.step) * stretch.shape.tokens

    def sequences(self, step: int) -> int:
        """Consumed by the first `step` steps."""
        stretch = self.at(step)
        return stretch.sequences + (step - stretch.step) * stretch.shape.batch

    def step_of(self, tokens: int) -> int:
        """The step before which so many tokens are consumed.

        Raises:
            ValueError: none is: they were counted under another config.
        """
        stretch = self.stretches[bisect_right(self._tokens, tokens) - 1]
        steps, rest = divmod(tokens - stretch.tokens, stretch.shape.tokens)
        if rest:
            raise ValueError(f"{tokens} tokens are no whole number of steps of this config")
        return stretch.step + steps

    def by_step(self) -> np.ndarray:
        """float64 [steps]: tokens consumed up to the end of each step."""
        parts = [
            s.tokens + s.shape.tokens * np.arange(1, s.steps + 1, dtype=np.float64)
            for s in self.stretches
        ]
        return np.concatenate(parts)


@lru_cache(maxsize=8)
def curriculum(config: Config) -> Curriculum:
    return Curriculum(config)


def shaped(config: Config, shape: Shape) -> Config:
    """The config that a step of this shape is compiled with."""
    train = config.train
    same = train.accumulate == shape.accumulate
    return config if same else replace(config, train=replace(train, accumulate=shape.accumulate))


def _stretches(config: Config) -> Iterator[Stretch]:
    train = config.train
    changes = sorted(
        {0, *_starts(train.batch_ramp), *_starts(train.length_ramp), *_starts(config.data.phases)}
    )
    step = tokens = sequences = 0
    while step < train.steps:
        shape, phase = _shape(config, tokens), _last(config.data.phases, tokens)
        later = [change for change in changes if change > tokens]
        left = train.steps - step
        # The first step that begins at the change or after it is the first of the new kind.
        steps = min(left, -(-(later[0] - tokens) // shape.tokens)) if later else left
        yield Stretch(step, steps, tokens, sequences, shape, phase)
        step, tokens = step + steps, tokens + steps * shape.tokens
        sequences += steps * shape.batch


def _shape(config: Config, tokens: int) -> Shape:
    """A batch keeps its tokens: its size by the ramp is that at sequences of train.seq_len."""
    train = config.train
    batch, length, accumulate = train.batch_size, train.seq_len, train.accumulate
    if (stage := _last(train.batch_ramp, tokens)) > 0:
        entry = train.batch_ramp[stage - 1]
        batch, accumulate = entry.batch_size, entry.accumulate
    if (stage := _last(train.length_ramp, tokens)) > 0:
        length = train.length_ramp[stage - 1].seq_len
    return Shape(batch * train.seq_len // length, length, accumulate)


class _Stage(Protocol):
    @property
    def tokens(self) -> int: ...


def _starts(stages: Iterable[_Stage]) -> list[int]:
    return [stage.tokens for stage in stages]


def _last(stages: Iterable[_Stage], tokens: int) -> int:
    """How many of these have begun after so many tokens."""
    return sum(start <= tokens for start in _starts(stages))
