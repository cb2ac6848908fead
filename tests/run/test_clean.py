"""Sound runs: what watches over them finds nothing."""

from pathlib import Path

import pytest
from rehearsal import configured, rehearse

from jaxmoe.config import (
    CheckpointConfig,
    EvalConfig,
    ForecastConfig,
    GuardConfig,
    HealthConfig,
    replace,
)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [3, 4, 5])
def test_two_thousand_sound_steps_raise_nothing(
    seed: int, text_cache: Path, tmp_path: Path
) -> None:
    """No step is bad, no copy differs, no checkpoint fails; of spikes there are none either.

    The floor of the norm's deviation was chosen after seeds 0 to 2, of which one had a step at five
    times the usual norm.
    """
    plain = configured(text_cache)
    ran = rehearse(
        tmp_path / "run",
        text_cache,
        axes={"replica": 2},
        seed=seed,
        train=replace(plain.train, steps=2000, log_every=10),
        eval=EvalConfig(every=100, batch_size=64),
        forecast=ForecastConfig(first=1000, every=500),
        checkpoint=CheckpointConfig(every=200),
        guard=GuardConfig(bad_step="rollback"),
        health=HealthConfig(checksum_every=20),
    )
    assert ran.error is None and ran.metrics[-1]["train/skipped"] == 0
    for what in ("rollback", "skip", "corruption", "save-failed", "hang", "crash"):
        assert not ran.events(what)
    assert not [row for row in ran.events("alarm") if row["why"].startswith("spike")]
