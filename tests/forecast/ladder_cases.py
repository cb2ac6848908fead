"""Synthetic ladders and recipes of known truth, from other formulas than the laws' priors."""

import numpy as np

from jaxmoe.forecast import Points, Run, Schedule


def dense_truth(rng: np.random.Generator) -> dict[str, float]:
    """A two-variable law: published exponents and terms, scattered."""
    return {
        "e": rng.uniform(1.5, 2.0),
        "a": rng.uniform(0.28, 0.42),
        "b": rng.uniform(0.26, 0.40),
        "n": rng.uniform(0.3, 0.5),
        "d": rng.uniform(0.3, 0.55),
    }


def dense_loss(truth: dict[str, float], n: np.ndarray, d: np.ndarray) -> np.ndarray:
    size = truth["n"] * (n / 1e9) ** -truth["a"]
    return truth["e"] + size + truth["d"] * (d / 2e10) ** -truth["b"]


def ladder(
    truth: dict[str, float],
    *,
    budgets: int = 9,
    top: float = 3e19,
    ratio: float = 20.0,
    noise: float = 0.002,
    seed: int = 0,
) -> Points:
    """Runs at D / N near `ratio`, each budget twice the one before, up to `top` FLOPs."""
    rng = np.random.default_rng(seed)
    c = top / 2.0 ** np.arange(budgets)[::-1]
    n = np.sqrt(c / (6 * ratio)) * np.exp(rng.normal(0, 0.1, budgets))
    d = c / (6 * n)
    return Points.of(n, d, dense_loss(truth, n, d) * np.exp(noise * rng.standard_normal(budgets)))


def target_of(truth: dict[str, float], flops: float) -> tuple[Points, float]:
    n = np.sqrt(flops / 120.0)
    return Points.of([n], [20 * n]), float(dense_loss(truth, np.array(n), np.array(20 * n)))


STEPS = 400


def recipe(
    sizes: list[float], *, noise: float = 0.0005, seed: int = 0, every: int = 10
) -> list[Run]:
    """Completed runs of one cosine recipe at several sizes: the larger falls further."""
    rng = np.random.default_rng(seed)
    step = np.arange(1, STEPS + 1)
    lr = 0.05 + 0.95 * 0.5 * (1 + np.cos(np.pi * step / STEPS))
    lr[:10] = np.linspace(0.1, 1, 10)
    schedule = Schedule.of(lr, tokens_per_step=1e6)
    steps = np.arange(every, STEPS + 1, every)
    runs = []
    for size in sizes:
        total = np.cumsum(lr)[steps - 1] / lr.sum()
        reducible = 0.8 * (size / 1e8) ** -0.2 + 0.9 * (total + 0.02) ** -0.4
        loss = 1.7 + reducible - 0.1 * (1 - lr[steps - 1])
        loss = loss * np.exp(noise * rng.standard_normal(steps.size))
        name = f"{size:.0e}"
        runs.append(Run(schedule=schedule, steps=steps, loss=loss, params_active=size, name=name))
    return runs
