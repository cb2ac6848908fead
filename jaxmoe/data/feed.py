"""What a run trains on: the one row of a text folder, or the sources of a data set in their mix."""

from collections.abc import Mapping

import numpy as np

from jaxmoe.config import Config
from jaxmoe.curriculum import curriculum
from jaxmoe.data.ahead import Ahead
from jaxmoe.data.corpus import TRAIN, Corpus
from jaxmoe.data.loader import Packed, Rows, Stream
from jaxmoe.data.mixture import Mixture, Used

__all__ = [
    "TRAIN",
    "counted",
    "first_time",
    "is_plain",
    "open_stream",
    "read_rows",
    "tokens",
    "used",
]


def is_plain(config: Config) -> bool:
    """Whether the stream is that of loader.py: one source, one length, cut where sequences end."""
    data = config.data
    return not (data.sources or config.train.length_ramp or data.packing != "split")


def open_stream(config: Config, corpus: Corpus) -> Stream | Mixture:
    """Raises UserError as they do."""
    if corpus.plain and is_plain(config):
        return Stream(corpus.train, config.train.seq_len, config.seed)
    kind = Ahead if corpus.remote else Mixture
    return kind(config, corpus.sources, _specials(corpus))


def read_rows(
    stream: Stream | Mixture, config: Config, step: int, start: int, stop: int
) -> Rows | Packed:
    """Rows start .. stop of the global batch of the step with index `step`, from 0."""
    if isinstance(stream, Mixture):
        return stream.rows(step, start, stop)
    tokens = stream.rows(curriculum(config).sequences(step), start, stop)
    return Rows(tokens, np.ones((stop - start, tokens.shape[1] - 1), np.float32))


def counted(stream: Stream | Mixture) -> tuple[str, ...]:
    """The sources of which the loss is counted on its own; none for the plain stream."""
    return stream.names if isinstance(stream, Mixture) else ()


def first_time(stream: Stream, config: Config, step: int) -> bool:
    """Whether no token of a step was read before in the run."""
    return curriculum(config).sequences(step + 1) <= len(stream)


def used(stream: Stream | Mixture) -> Mapping[str, Used]:
    """What the run reads of each source of a mix."""
    return stream.used if isinstance(stream, Mixture) else {}


def tokens(corpus: Corpus) -> int:
    """Of the training text."""
    return sum(s.tokens for s in corpus.sources.values())


def _specials(corpus: Corpus) -> Mapping[str, int]:
    known = getattr(corpus.tokenizer, "specials", {})
    return {"eot": corpus.tokenizer.eot, **known}
