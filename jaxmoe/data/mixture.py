"""The training stream of several sources: a pure function of (seed, config, sequence number).

Sequences of one mix and one length are a *segment*, 1,024 and more of them a *block*. How many
sequences of each source lie before a block is arithmetic on exact fractions; the order inside it is
a computed permutation, and a source's sequences lie one after another in its own row (packing.py).
So every token comes as often as planned, a change of the mix, the length or the batch neither
repeats nor skips any, and nothing has to be replayed to read at any place.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from jaxmoe.config import Config, SourceConfig
from jaxmoe.curriculum import curriculum
from jaxmoe.data.fim import FimSource, Sentinels, sentinels
from jaxmoe.data.loader import Packed, Rows
from jaxmoe.data.packing import Packer, Span
from jaxmoe.data.shuffle import Permutation, make_key
from jaxmoe.data.store import Source
from jaxmoe.errors import UserError

__all__ = ["BLOCK", "Mixture", "Sample", "Used"]

# Sequences of a block, for each one in a window: neighbours in a source's row are spread over so
# many windows. Small, since a run's last block ends with it: runs of other lengths begin alike.
BLOCK = 1 << 10
_LARGEST = 1 << 16


class Sample(NamedTuple):
    """Where a sequence of the stream comes from."""

    source: str
    at: int  # tokens of the source's row before it, over all epochs
    length: int


class Used(NamedTuple):
    """What a run reads of a source."""

    tokens: int
    epoch: int  # tokens of an epoch
    epochs: float
    skipped: int  # of the tokens: left out where the length changes (best_fit alone)


@dataclass(frozen=True)
class _Segment:
    """Sequences of one mix and one length."""

    first: int  # sequence number
    n: int
    length: int
    # Of what the sources before leave, by source: the last one with a weight takes all.
    shares: tuple[Fraction, ...]
    starts: tuple[int, ...]  # tokens of each source's row before it

    def counts(self, n: int) -> list[int]:
        """Of the first `n` sequences, how many are each source's; never falls as n grows."""
        found = []
        for share in self.shares:
            found.append((2 * share.numerator * n + share.denominator) // (2 * share.denominator))
            n -= found[-1]
        return found

    def ends(self) -> list[int]:
        """Tokens of each source's row after it."""
        pairs = zip(self.starts, self.counts(self.n), strict=True)
        return [start + self.length * count for start, count in pairs]


class _Block(NamedTuple):
    """Its sequences in the order of the stream."""

    sources: np.ndarray  # int64 [n]
    at: np.ndarray  # int64 [n]: tokens of the source's row before each


class Mixture:
    """The sequences of a run, by step and row.

    Raises:
        UserError: a source is missing or shorter than a sequence, is planned beyond its epochs, or
            its tokenizer has no sentinels for fill in the middle.
    """

    def __init__(
        self, config: Config, sources: Mapping[str, Source], specials: Mapping[str, int]
    ) -> None:
        """`specials`: ids of the tokenizer's special tokens, "eot" among them."""
        self._config, self._plan = config, curriculum(config)
        self._eot, self._seed = specials["eot"], config.seed
        self._mix = _mix(config, sources)
        self.names = tuple(one.name for one in self._mix)
        lengths = _lengths(config)
        self._views = {one.name: self._view(sources[one.name], one, specials) for one in self._mix}
        self._packers = {
            name: Packer(view, lengths, config.data.packing, make_key("source", self._seed, name))
            for name, view in self._views.items()
        }
        for name, packer in self._packers.items():
            if not packer.epoch:
                raise UserError(
                    f"source {name!r} has {sources[name].tokens} tokens: a sequence of"
                    f" {max(lengths)} needs {max(lengths) + 1}; shorten train.seq_len or drop it"
                )
        self._caps = [self._cap(one) for one in self._mix]
        self._skipped = dict.fromkeys(self.names, 0)
        self._segments = self._plan_segments()
        self._first = [segment.first for segment in self._segments]
        self._block = lru_cache(maxsize=4)(self._make_block)
        self._drawn = lru_cache(maxsize=8)(self._draw)  # asked for rows, and for first_times

    # What a run reads

    @property
    def used(self) -> dict[str, Used]:
        """By source, over all of the run."""
        ends = self._segments[-1].ends()
        sizes = [self._packers[name].epoch for name in self.names]
        return {
            name: Used(tokens, size, tokens / size, self._skipped[name])
            for name, tokens, size in zip(self.names, ends, sizes, strict=True)
        }

    @property
    def sequences(self) -> int:
        return self._segments[-1].first + self._segments[-1].n

    def rows(self, step: int, start: int, stop: int) -> Rows | Packed:
        """Rows start .. stop of the global batch of the step with index `step`, from 0."""
        samples = self.samples(step, start, stop)
        length = self._plan.at(step).shape.length
        tokens = np.empty((len(samples), length + 1), np.int32)
        weights = np.ones((len(samples), length), np.float32)
        ends = np.zeros((len(samples), length), bool)
        spans = [self.spans(sample) for sample in samples]
        self._each(self._fill, samples, spans, tokens, weights, ends)
        if not self._config.data.document_mask:
            return Rows(tokens, weights)
        ends |= tokens[:, :-1] == self._eot
        return Packed(tokens, weights, 1 + np.cumsum(ends, axis=1, dtype=np.int32) - ends)

    def samples(self, step: int, start: int, stop: int) -> list[Sample]:
        """Where rows start .. stop of the batch of a step come from."""
        assert 0 <= start <= stop <= self._plan.at(step).shape.batch, (start, stop)
        first = self._plan.sequences(step)
        return self._drawn(first + start, first + stop)

    def _draw(self, first: int, last: int) -> list[Sample]:
        return [self.sample(number) for number in range(first, last)]

    def spans(self, sample: Sample) -> list[Span]:
        """The sequence's parts, each in the source as its epoch reads it (`view`)."""
        return self._packers[sample.source].spans(sample.at, sample.length)

    def view(self, source: str, epoch: int) -> Source:
        """A source as an epoch reads it: with documents turned around, where the config says."""
        return self._views[source](epoch)

    def first_times(self, step: int, start: int, stop: int) -> np.ndarray:
        """float32 [rows, sources], `names` in order: 1 for the source of a row of which no token
        was read before in the run."""
        samples = self.samples(step, start, stop)
        epochs = {name: packer.epoch for name, packer in self._packers.items()}
        fresh = [s.at + s.length <= epochs[s.source] for s in samples]
        mine = [[s.source == name for name in self.names] for s in samples]
        return np.array(mine, np.float32).reshape(len(samples), -1) * np.array(fresh)[:, None]

    # A sequence

    def sample(self, number: int) -> Sample:
        """Where sequence `number` of the run comes from."""
        if not 0 <= number < self.sequences:
            raise UserError(f"sequence {number} of a run of {self.sequences}: give a lower one")
        segment_number = bisect_right(self._first, number) - 1
        segment = self._segments[segment_number]
        block, place = divmod(number - segment.first, self._block_size(segment))
        found = self._block(segment_number, block)
        name = self.names[int(found.sources[place])]
        return Sample(name, int(found.at[place]), segment.length)

    def _block_size(self, segment: _Segment) -> int:
        rows = max(-(-packer.window // segment.length) for packer in self._packers.values())
        return min(BLOCK * rows, _LARGEST)

    def _make_block(self, number: int, block: int) -> _Block:
        """Shuffled, but for the epochs of each source: one is read to its end before the next."""
        segment = self._segments[number]
        size = self._block_size(segment)
        first, last = block * size, min((block + 1) * size, segment.n)
        before, after = segment.counts(first), segment.counts(last)
        until = np.cumsum([b - a for a, b in zip(before, after, strict=True)])
        key = make_key("order", self._seed, number, block)
        order = Permutation(last - first, key)(np.arange(last - first))
        sources = np.searchsorted(until, order, "right")
        at = np.empty(last - first, np.int64)
        for source, name in enumerate(self.names):
            mine = np.flatnonzero(sources == source)
            sorted_first = until[source] - (after[source] - before[source])
            place = segment.starts[source] + segment.length * (
                before[source] + order[mine] - sorted_first
            )
            epoch = place // self._packers[name].epoch
            at[mine] = place[np.argsort(epoch, kind="stable")]
        return _Block(sources, at)

    def _each(self, fill: Callable[..., None], *rows: Iterable[Any]) -> None:
        """`fill` of every row."""
        for row in zip(*rows, strict=True):
            fill(*row)

    def _fill(
        self,
        sample: Sample,
        spans: Sequence[Span],
        tokens: np.ndarray,
        weights: np.ndarray,
        ends: np.ndarray,
    ) -> None:
        """One row. Where a part of another place follows, it is another document; its first token
        is a target only where a document begins after an eot."""
        at = 0
        for span in spans:
            view = self._views[sample.source](span.epoch)
            before = at > 0 < span.start  # the token before it says whether a document begins
            more = span is spans[-1]  # the token after it is the last target
            part = view.read(span.start - before, span.stop + more)
            if at:
                ends[at - 1] = True
                begins = not before or part[0] == self._eot
                weights[at - 1] = tokens[at - 1] == self._eot and begins
            tokens[at : at + len(part) - before] = part[before:]
            at += span.stop - span.start

    # The plan

    def _view(self, source: Source, one: SourceConfig, specials: Mapping[str, int]) -> "_View":
        marks = sentinels(specials, one.name) if one.fim_rate else None
        return _View(source, one, marks, self._seed)

    def _cap(self, one: SourceConfig) -> int | None:
        if one.epochs is None:
            return None
        return int(Fraction(str(one.epochs)) * self._packers[one.name].epoch)

    def _plan_segments(self) -> list[_Segment]:
        segments: list[_Segment] = []
        starts = tuple(0 for _ in self.names)
        kinds = groupby(self._plan.stretches, key=lambda s: (s.phase, s.shape.length))
        first = 0
        for (phase, length), group in kinds:
            if segments and segments[-1].length != length:
                starts = self._moved_on(starts)
            left = sum(stretch.steps * stretch.shape.batch for stretch in group)
            while left:
                shares = _shares(self._weights(phase, starts, length))
                segment = self._until_cap(_Segment(first, left, length, shares, starts))
                segments.append(segment)
                starts = tuple(segment.ends())
                first, left = first + segment.n, left - segment.n
        self._check_caps(starts)
        return segments

    def _moved_on(self, starts: Sequence[int]) -> tuple[int, ...]:
        """Where sequences of another length begin."""
        found = []
        for name, at in zip(self.names, starts, strict=True):
            found.append(self._packers[name].next_start(at))
            self._skipped[name] += found[-1] - at
        return tuple(found)

    def _weights(self, phase: int, starts: Sequence[int], length: int) -> list[Fraction]:
        """Of each source; 0 for one that has been read as often as it may."""
        mix = {one.name: one.weight for one in self._mix}
        if phase:
            mix = dict(self._config.data.phases[phase - 1].weights)
        weights = [Fraction(str(mix.get(name, 0))) for name in self.names]
        if self._config.data.on_cap == "redistribute":
            ended = [cap is not None and at + length > cap for cap, at in self._capped(starts)]
            weights = [0 if end else w for end, w in zip(ended, weights, strict=True)]
            if not any(weights):
                self._refuse(f"after {sum(starts):,} tokens no source is left")
        return [Fraction(weight) for weight in weights]

    def _until_cap(self, segment: _Segment) -> _Segment:
        """The part of it up to where a source has been read as often as it may."""
        if self._config.data.on_cap == "refuse":
            return segment
        n = segment.n
        for source, (cap, at) in enumerate(self._capped(segment.starts)):
            if cap is not None and segment.shares[source]:
                most = (cap - at) // segment.length
                fits = partial(_count_is_more, segment, source, most)
                n = bisect_right(range(1, n + 1), 0, key=fits)
        assert n > 0, segment  # a source with a share has a sequence left
        return _Segment(segment.first, n, segment.length, segment.shares, segment.starts)

    def _capped(self, starts: Sequence[int]) -> list[tuple[int | None, int]]:
        return list(zip(self._caps, starts, strict=True))

    def _check_caps(self, ends: Sequence[int]) -> None:
        for one, (cap, tokens) in zip(self._mix, self._capped(ends), strict=True):
            if cap is not None and tokens > cap and self._config.data.on_cap == "refuse":
                size = self._packers[one.name].epoch
                self._refuse(
                    f"the run reads {tokens:,} tokens of source {one.name!r}, {tokens / size:.2f}"
                    f" times its {size:,}, and its epochs={one.epochs}"
                )

    def _refuse(self, why: str) -> None:
        raise UserError(
            f"data.sources: {why}; lower train.steps or a weight, raise epochs, or set"
            " data.on_cap=redistribute"
        )


class _View:
    """A source by epoch."""

    def __init__(
        self, source: Source, one: SourceConfig, marks: Sentinels | None, seed: int
    ) -> None:
        self._source, self._one, self._marks, self._seed = source, one, marks, seed
        self._turned = lru_cache(maxsize=4)(self._turn)

    def __call__(self, epoch: int) -> Source:
        return self._source if self._marks is None else self._turned(epoch)

    def _turn(self, epoch: int) -> Source:
        one, key = self._one, make_key("fim", self._seed, self._one.name, epoch)
        assert self._marks is not None
        return FimSource(self._source, self._marks, rate=one.fim_rate, spm=one.fim_spm, key=key)


def _count_is_more(segment: _Segment, source: int, most: int, n: int) -> int:
    return int(segment.counts(n)[source] > most)


def _lengths(config: Config) -> list[int]:
    """Of training sequences, also those that the run ends before: a longer one begins alike."""
    ramp = config.train.length_ramp
    first = () if ramp and ramp[0].tokens == 0 else (config.train.seq_len,)
    return sorted({*first, *(stage.seq_len for stage in ramp)})


def _mix(config: Config, sources: Mapping[str, Source]) -> tuple[SourceConfig, ...]:
    for one in config.data.sources:
        if one.name not in sources:
            names = ", ".join(map(repr, sources))
            raise UserError(f"data.sources: no source {one.name!r} in the data set; it has {names}")
    if config.data.sources:
        return config.data.sources
    return tuple(SourceConfig(name=n, weight=float(s.tokens)) for n, s in sources.items())


def _shares(weights: Sequence[Fraction]) -> tuple[Fraction, ...]:
    """Of each source in what those before it leave; exact, so that their counts add up."""
    found, left = [], sum(weights, Fraction(0))
    for weight in weights:
        found.append(weight / left if weight else Fraction(0))
        left -= weight
    return tuple(found)
