"""Sources whose tokens say where they were, and random plans over them."""

from collections import Counter
from typing import Any

import numpy as np
from hypothesis import strategies as st

from jaxmoe.config import (
    BatchStage,
    Config,
    DataConfig,
    LengthStage,
    ModelConfig,
    PhaseConfig,
    SourceConfig,
    TrainConfig,
)
from jaxmoe.curriculum import curriculum
from jaxmoe.data.mixture import Mixture
from jaxmoe.data.store import StoredSource

EOT = 0
SPECIALS = {"eot": EOT, "fim_prefix": 1, "fim_middle": 2, "fim_suffix": 3}
NAMES = ("code", "text", "odd_1")


def numbered(name: str, lengths: list[int], base: int = 1000) -> StoredSource:
    """Documents of so many tokens, each token's id `base` + its place in the source's row."""
    ends = 1 + np.cumsum([n + 1 for n in lengths])
    row = base + np.arange(ends[-1], dtype=np.int32)
    row[np.append(0, ends - 1)] = EOT
    return StoredSource(name, [row], ends)


def some_sources(draw: Any, longest: int) -> dict[str, StoredSource]:
    """Each of at least one sequence of the greatest length."""
    found = {}
    for number, name in enumerate(NAMES[: draw(st.integers(1, 3))]):
        lengths = draw(st.lists(st.integers(0, 3 * longest), min_size=1, max_size=12))
        found[name] = numbered(name, [*lengths, longest + 1], 10_000 * (number + 1))
    return found


@st.composite
def plans(draw: Any, fim: bool = False) -> tuple[Config, dict[str, StoredSource]]:
    """Mixes, caps, phases, ramps of batch and length, packings."""
    unit = draw(st.integers(1, 5))
    lengths = [unit * n for n in (1, 2, 4)]
    sources = some_sources(draw, lengths[-1])
    tokens = st.integers(1, 600)
    stages = lambda: sorted(draw(st.sets(tokens, max_size=2)))  # noqa: E731
    capped = draw(st.booleans())
    weights = st.floats(0.125, 8, width=16)
    mix = [
        SourceConfig(
            name=name,
            weight=draw(weights),
            # The first has no cap: something is always left to read.
            epochs=draw(st.sampled_from([0.5, 1.0, 2.5])) if capped and i else None,
            fim_rate=draw(st.sampled_from([0.0, 0.3, 1.0])) if fim else 0.0,
            fim_spm=draw(st.sampled_from([0.0, 0.5, 1.0])),
        )
        for i, name in enumerate(sources)
    ]
    phases = tuple(
        PhaseConfig(tokens=t, weights=tuple((n, draw(weights)) for n in sources)) for t in stages()
    )
    ramp = tuple(BatchStage(tokens=t, batch_size=draw(st.integers(1, 9))) for t in stages())
    lengthening = tuple(
        LengthStage(tokens=t, seq_len=draw(st.sampled_from(lengths))) for t in stages()
    )
    return Config(
        seed=draw(st.integers(0, 9)),
        model=ModelConfig(loss_chunk=1),
        data=DataConfig(
            sources=tuple(mix),
            phases=phases,
            packing=draw(st.sampled_from(["split", "best_fit"])),
            document_mask=draw(st.booleans()),
            on_cap="redistribute",
        ),
        train=TrainConfig(
            steps=draw(st.integers(1, 30)),
            batch_size=draw(st.integers(1, 9)),
            seq_len=lengths[-1],
            batch_ramp=ramp,
            length_ramp=lengthening,
        ),
    ), sources


def batch_of(config: Config, step: int) -> int:
    return curriculum(config).at(step).shape.batch


def places(config: Config, stream: Mixture) -> Counter[tuple[str, int, int]]:
    """How often each (source, epoch, token) is an input of the run."""
    seen: Counter[tuple[str, int, int]] = Counter()
    for step in range(config.train.steps):
        for sample in stream.samples(step, 0, batch_of(config, step)):
            for epoch, start, stop in stream.spans(sample):
                seen.update((sample.source, epoch, token) for token in range(start, stop))
    return seen
