"""Stages of a run: consecutive steps of one compiled shape (jaxmoe/curriculum.py)."""

from dataclasses import dataclass
from itertools import groupby

from jaxmoe.config import Config, replace
from jaxmoe.curriculum import Curriculum, Shape, curriculum

__all__ = ["Stage", "mean_over", "pinned", "ramped", "stages"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Attributes:
    shape: of its steps.
    step: the first; steps count from 0.
    start: tokens consumed before it.
    tokens: consumed in it.
    """

    shape: Shape
    step: int
    start: int
    tokens: int

    @property
    def steps(self) -> float:
        """Not whole where a number of tokens was asked for that no step ends at."""
        return self.tokens / self.shape.tokens


def ramped(config: Config) -> bool:
    return bool(config.train.batch_ramp or config.train.length_ramp)


def stages(config: Config, tokens: int | None = None) -> tuple[Stage, ...]:
    """Of a run of so many tokens (None: of train.steps), in order; one where nothing changes.

    A longer run than train.steps comes to stages of the ramps that train.steps does not.
    """
    plan = _long_enough(config, tokens)
    end = plan.tokens(plan.steps) if tokens is None else tokens
    found = []
    for shape, group in groupby(plan.stretches, key=lambda stretch: stretch.shape):
        first, *_ = same = list(group)
        stop = min(end, plan.tokens(same[-1].step + same[-1].steps))
        if stop > first.tokens:
            left = stop - first.tokens
            found.append(Stage(shape=shape, step=first.step, start=first.tokens, tokens=left))
    return tuple(found)


def pinned(config: Config, shape: Shape) -> Config:
    """A config whose every step has this shape; the config itself where nothing changes."""
    if not ramped(config):
        return config
    train = replace(
        config.train,
        batch_size=shape.batch,
        seq_len=shape.length,
        accumulate=shape.accumulate,
        batch_ramp=(),
        length_ramp=(),
    )
    return replace(config, train=train)


def mean_over(parts: tuple[Stage, ...], seconds: dict[Shape, float]) -> float:
    """Seconds of a step over the whole run, of those of each shape."""
    steps = sum(part.steps for part in parts)
    return sum(seconds[part.shape] * (part.steps / steps) for part in parts)


def _long_enough(config: Config, tokens: int | None) -> Curriculum:
    if tokens is None:
        return curriculum(config)
    train = config.train
    smallest = min([train.batch_size, *(stage.batch_size for stage in train.batch_ramp)])
    steps = -(-tokens // (smallest * train.seq_len))
    return curriculum(replace(config, train=replace(train, steps=steps)))
