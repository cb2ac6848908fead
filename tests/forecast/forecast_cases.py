"""Synthetic runs of known truth. They are not drawn from the law under test alone: its noise, its
annealing shape and a slow drift of the slope come from other formulas."""

import numpy as np

from jaxmoe.forecast import Run, Schedule

STEPS, WARMUP, EVERY = 1000, 50, 25


def rates(kind: str, *, steps: int = STEPS, decay: float = 0.3, final: float = 0.0) -> np.ndarray:
    step = np.arange(1, steps + 1)
    if kind == "wsd":
        tail = np.clip((steps - step) / (decay * steps), 0, 1)
    elif kind == "cosine":
        turn = np.clip((step - WARMUP) / (steps - WARMUP), 0, 1)
        tail = 0.5 * (1 + np.cos(np.pi * turn))
    else:
        tail = np.ones(steps)
    return np.minimum(1, step / WARMUP) * (final + (1 - final) * tail)


def synthetic(
    seed: int, kind: str = "wsd", *, noise: float = 0.002, every: int = EVERY, decay: float = 0.3
) -> tuple[Run, float]:
    """A run of 8.3 nats that falls to about 3, and its final loss without noise.

    The annealing is the multi-power kernel of Luo et al. 2025 (eq. 3), not the law's own lag.
    """
    rng = np.random.default_rng(seed)
    lr = rates(kind, decay=decay)
    total = np.cumsum(lr)
    floor, alpha = rng.uniform(1.0, 2.6), np.exp(rng.normal(np.log(0.4), 0.3))
    excess = rng.uniform(0.2, 0.6) * (total / total[-1] + 0.01) ** -alpha
    start = 3.0 * np.exp(-total / 25)
    fall = np.maximum(0, -np.diff(lr, prepend=lr[0]))
    drop = np.exp(rng.normal(np.log(0.05), 0.25))
    rate, power = 40 / STEPS, rng.uniform(0.5, 1.0)
    gain = np.zeros(STEPS)
    for at in np.flatnonzero(fall):
        since = (total[at:] - total[at]) / np.sqrt(max(lr[at], 1e-3))
        gain[at:] += fall[at] * (1 - (1 + rate * since) ** -power)
    drift = np.cumsum(rng.normal(0, 0.02, STEPS) * np.sqrt(1 / np.arange(1, STEPS + 1)))
    clean = (floor + excess) * (1 - drop * gain) + start + 0.05 * (drift - drift[-1])
    steps = np.arange(every, STEPS + 1, every)
    loss = clean[steps - 1] * (1 + noise * rng.standard_normal(steps.size))
    schedule = Schedule.of(lr, tokens_per_step=2048)
    return Run(schedule=schedule, steps=steps, loss=loss, name=f"{kind}-{seed}"), float(clean[-1])


def record(step: int = 300, **changes: object) -> dict:
    loss = {"q05": 2.9, "q25": 3.0, "median": 3.1, "q75": 3.2, "q95": 3.3}
    base = {
        "kind": "forecast",
        "config": "abc123abc123",
        "set": "stdlib",
        "set_fingerprint": "f00",
        "train_fingerprint": "7ea",
        "leaking": 0,
        "cutoff_step": step,
        "cutoff_tokens": step * 2048.0,
        "observations_sha256": "0" * 64,
        "law": "within-run-v1",
        "step": step,
        "tokens": step * 2048.0,
        "horizon_steps": 1000 - step,
        "metric": "held-out nats per token",
        "schedule": {"sha256": "5" * 64, "steps": 1000},
        "code": "c0de",
        "siblings": [],
        "laws": {"within-run-v1": 1.0},
        "target_step": 1000,
        "target_tokens": 2048000.0,
        "loss": loss,
    }
    return {**base, **changes}


def outcome(realised: float = 3.05, **changes: object) -> dict:
    keys = ("config", "set", "set_fingerprint", "target_step", "target_tokens")
    keys += ("train_fingerprint", "leaking")
    base = {k: v for k, v in record().items() if k in keys}
    return {**base, "kind": "outcome", "loss": {"realised": realised}, **changes}
