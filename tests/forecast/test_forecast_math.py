"""docs/forecast_math.md: its constants, names and sources are the code's, and its formulas, written
anew from the page alone, give what the code gives."""

import ast
import dataclasses
import importlib
import itertools
import math
import re
import subprocess
import sys
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from scipy.integrate import dblquad
from scipy.stats import t

from jaxmoe.forecast import alarms, dense_laws, ladder_path, laws, score, siblings
from jaxmoe.forecast.alarms import ShiftWatch
from jaxmoe.forecast.curve import Run, Schedule
from jaxmoe.forecast.dense_laws import DenseLaw
from jaxmoe.forecast.gaussian import nodes
from jaxmoe.forecast.mixture import Mixture
from jaxmoe.forecast.moe_law import MoeLaw
from jaxmoe.forecast.points import Points
from jaxmoe.forecast.stack import Stack, StackFit
from jaxmoe.forecast.trend import Prior, Trend

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "forecast_math.md").read_text()
HERE = ROOT / "jaxmoe" / "forecast"
PARTS = {path.stem: path for path in HERE.glob("*.py")}
PARTS |= {name: ROOT / "jaxmoe" / "ladder" / f"{name}.py" for name in ("gate", "advice")}
BULLETS = dict(re.findall(r"^- `([\w.]+)`: (.+(?:\n  .+)*)$", TEXT, re.M))
CALLS = {
    "N": lambda mean, sd: laws.Prior(mean=mean, sd=sd),
    "log": np.log,
    "middles": lambda n: (np.arange(n) + 0.5) / n,
    "exp": np.exp,
    "geomspace": np.geomspace,
    "nodes": nodes,
}


def module_of(stem: str) -> Any:
    folder = PARTS[stem].parent.name
    return importlib.import_module(f"jaxmoe.{folder}.{stem}")


def found(name: str) -> Any:
    """`module.object.attribute` of the forecast or of the ladder."""
    stem, *rest = name.split(".")
    value = module_of(stem)
    for part in rest:
        value = getattr(value, part)
    return value


def value_of(node: ast.expr) -> Any:
    """Of numbers, tuples, dicts and CALLS."""
    if isinstance(node, ast.Name):
        return {"inf": np.inf}[node.id]
    if isinstance(node, ast.UnaryOp):
        return -value_of(node.operand)
    if isinstance(node, ast.Tuple):
        return tuple(map(value_of, node.elts))
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {ast.literal_eval(key): value_of(value) for key, value in pairs if key}
    if isinstance(node, ast.Call):
        assert isinstance(node.func, ast.Name)
        return CALLS[node.func.id](*map(value_of, node.args))
    return ast.literal_eval(node)


def told(of: str) -> dict[str, Any]:
    """The constants that the page gives."""
    call = ast.parse(f"dict({BULLETS[of]})", mode="eval").body
    assert isinstance(call, ast.Call) and not call.args
    return {str(k.arg): value_of(k.value) for k in call.keywords}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, laws.Prior) or isinstance(a, dict):
        return a == b
    return np.shape(a) == np.shape(b) and bool(np.allclose(a, b, rtol=1e-12, atol=0))


def constants(stem: str) -> set[str]:
    """Numbers, and tables of numbers, that a module sets in capitals."""
    body = ast.parse(PARTS[stem].read_text()).body
    targets = [t for node in body if isinstance(node, ast.Assign) for t in node.targets]
    targets += [node.target for node in body if isinstance(node, ast.AnnAssign)]
    nodes_of = [node for target in targets for node in ast.walk(target)]
    names = {n.id for n in nodes_of if isinstance(n, ast.Name) and re.match("[A-Z]", n.id)}
    return {name for name in names if is_numbers(getattr(module_of(stem), name))}


def is_numbers(value: Any) -> bool:
    parts = list(value.values()) if isinstance(value, dict) else value
    if isinstance(parts, tuple | list):
        return all(isinstance(v, int | float) for v in parts)
    return isinstance(parts, int | float | np.ndarray)


@pytest.mark.parametrize("of", BULLETS)
def test_each_constant_is_the_one_in_the_code(of: str) -> None:
    owner = found(of)
    for name, value in told(of).items():
        own = owner[name] if isinstance(owner, dict) else getattr(owner, name)
        assert same(value, own), f"{of}.{name} = {own} in the code, {value} on the page"


def test_no_constant_of_these_modules_is_left_out() -> None:
    modules = [of for of in BULLETS if "." not in of]
    assert len(modules) >= 15
    for of in modules:
        assert constants(of) == set(told(of)), of
    for of in ("dense_laws.DEFAULT", "siblings.DEFAULT"):
        assert {f.name for f in dataclasses.fields(found(of))} == set(told(of))
    assert set(laws.PRIOR) == set(told("laws.PRIOR"))
    assert sum(len(told(of)) for of in BULLETS) > 130


def test_every_file_function_and_source_on_the_page_is_there() -> None:
    quoted = set(re.findall(r"`([^`\n]+)`", TEXT))
    files = {name for name in quoted if name.endswith(".py")}
    known = {path.name for path in (ROOT / "jaxmoe").rglob("*.py")}
    assert {name for name in files if "/" not in name} <= known
    assert all((ROOT / name).is_file() for name in files if "/" in name)
    dotted = {name for name in quoted - files if re.fullmatch(r"[a-z_]+(\.\w+)+", name)}
    for name in dotted:
        found(name)
    assert len(files) > 12
    assert len(dotted) > 25
    papers = set(re.findall(r"arXiv:(\d{4}\.\d{5})", TEXT))
    cited = "".join(path.read_text() for path in HERE.glob("*.py"))
    assert len(papers) >= 10
    assert {paper for paper in papers if paper not in cited} == set()
    floors = re.findall(r"floor=([\d.]+)", (ROOT / "jaxmoe" / "run" / "watching.py").read_text())
    told_floors = f"the loss has floor {floors[0]}, the gradient norm {floors[1]}."
    assert told_floors in " ".join(TEXT.split())


def test_the_worked_example_is_what_the_law_says() -> None:
    """The code on the page, run as it stands, prints the law's mean and standard deviation."""
    blocks = re.findall(r"(?:^    .*\n)+", TEXT.split("## By hand")[1], re.M)
    code = next(block for block in blocks if "import numpy" in block)
    done = subprocess.run(
        [sys.executable, "-c", re.sub("^    ", "", code, flags=re.M)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    printed = [float(word) for word in done.stdout.split()]
    flops = np.array([1e18, 4e18, 1.6e19, 6.4e19])
    size, ahead = np.sqrt(flops / 120), [np.sqrt(6.4e20 / 120)]
    seen = Points.of(size, 20 * size, [3.60, 3.35, 3.17, 3.04], flops=flops)
    target = Points.of(ahead, 20 * np.array(ahead), flops=[6.4e20])
    mixture = DenseLaw(name="compute").fit(seen).mixture(target)
    assert printed == pytest.approx(np.ravel(mixture.moments()), rel=1e-9, abs=0), done.stderr
    assert f"It prints {printed[0]:.6f} and {printed[1]:.6f}" in TEXT


def test_what_is_told_by_hand() -> None:
    hand = TEXT.split("## By hand")[1]
    one, two = -1.0, -2.0
    twice = dblquad(lambda v, u: min(u, v), 0, -one, 0, -two, epsabs=1e-12)[0]
    cov = dense_laws.integrated(np.array([one, two, 3.0]))
    assert cov[0, 1] == pytest.approx(5 / 6, rel=1e-12)
    assert cov[0, 1] == pytest.approx(twice, rel=1e-6)
    assert cov[1, 1] == pytest.approx(8 / 3, rel=1e-12)
    assert cov[2].tolist() == [0.0, 0.0, pytest.approx(9.0)]
    assert np.array_equal(cov, laws._integrated(np.array([one, two, 3.0])))
    fit = DenseLaw(name="compute").fit_unchecked(Points.of([1e6], [2e7], [4.0]))
    for budgets, told_width in re.findall(r"(\d+) budgets (0\.\d+)", hand):
        stack = StackFit(
            fits=(fit,), weight=np.ones(1), backtests=(), spread=0.0, budgets=int(budgets)
        )
        width = 0.5 * math.sqrt(1 + 2 / max(int(budgets) - 3, 1))
        assert stack.width() == pytest.approx(width, rel=1e-12)
        assert f"{width:.4f}" == told_width
    widths = [siblings.Constants().width_of(n) for n in (1, 4, 16)]
    assert widths == pytest.approx([1 / 3, 0.5, 0.75])
    assert "1 of them 0.3333, 4 0.5, 16 0.75" in hand
    watch = ShiftWatch(100)
    sums = [watch._look(z, step).cusum for step, z in enumerate((2, 3, 9, 5, 4), 1)]
    assert sums == [1, 3, 6, 9, 12]
    assert sums[3] < alarms.LIMIT < sums[4]


def test_the_stack_is_as_on_the_page() -> None:
    """Weights from the backtests' scores, and the width about the median."""
    flops = np.geomspace(1e17, 1e20, 10)
    size = np.sqrt(flops / 120) * np.exp(0.16 * (-1.0) ** np.arange(10))
    loss = 1.7 + (size / 1e9) ** -0.5
    points = Points.of(size, flops / (6 * size), loss, flops=flops)
    fit = Stack().fit(points)
    shares = {"chinchilla": 0.5, "outer power": 0.25, "compute": 0.25}
    scores = np.array([test.score for test in fit.backtests])
    assert scores.shape == (2, 3)
    assert (scores.max(axis=1) - scores.min(axis=1)).min() > 4  # which one backtest may not cost
    log = np.log(list(shares.values()))
    log = log + np.maximum(scores - scores.max(axis=1, keepdims=True), -4).sum(0)
    assert list(fit.weights) == list(shares)
    assert fit.weight == pytest.approx(np.exp(log - np.logaddexp.reduce(log)), rel=1e-9)

    x, y = np.log(flops / flops.max()), np.log(flops / (6 * size**2))
    spread = np.std(y - np.polyval(np.polyfit(x, y, 2), x))
    target = Points.of([1e10], [2e11])
    drawn = fit.uncalibrated(target)
    centre, width = drawn.quantile([0.5])[0, 0], 0.5 * math.sqrt(1 + 2 / (10 - 3))
    made = fit.mixture(target)
    assert made.mean == pytest.approx(centre + width * (drawn.mean - centre), rel=1e-9)
    assert made.sd == pytest.approx(np.hypot(width * drawn.sd, 0.008 * spread * centre), rel=1e-9)


def test_the_scores_by_hand() -> None:
    hand = TEXT.split("## By hand")[1]
    loss = {"q05": 2.90, "q25": 2.96, "median": 3.00, "q75": 3.04, "q95": 3.10}
    level, came = {"q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95}, 3.05
    own = [max(p * (came - loss[k]), (p - 1) * (came - loss[k])) for k, p in level.items()]
    z = NormalDist().inv_cdf
    knots = [(z(p), loss[k]) for k, p in level.items()]

    def quantile(p: float) -> float:
        pieces = list(itertools.pairwise(knots))
        (a, low), (b, high) = next((q for q in pieces if z(p) <= q[1][0]), pieces[-1])
        return low + (high - low) * (z(p) - a) / (b - a)

    grid = [(k + 0.5) / 200 for k in range(200)]
    drawn = [quantile(p) for p in grid]
    every = [max(p * (came - q), (p - 1) * (came - q)) for p, q in zip(grid, drawn, strict=True)]
    record: dict[str, Any] = {"index": 0, "law": "x", "cutoff_step": 0, "target_step": 9}
    record |= {"cutoff_tokens": 0, "target_tokens": 9, "loss": loss}
    made = score._score(record, came)
    assert made.pinball == pytest.approx(np.mean(own), rel=1e-9)
    assert made.crps == pytest.approx(2 * np.mean(every), rel=1e-9)
    assert made.pit == pytest.approx(np.mean(np.array(drawn) < came), rel=1e-9)
    assert made.width80 * came == pytest.approx(quantile(0.9) - quantile(0.1), rel=1e-9)
    shown = f"pinball {made.pinball:.4f}, CRPS {made.crps:.5f}, PIT {made.pit:.2f}"
    assert shown in hand
    assert f"80 % interval {quantile(0.1):.4f} to {quantile(0.9):.4f}" in hand


def log_normal(y: Any, mean: Any, cov: Any) -> float:
    """Log density at y."""
    off, size = y - mean, np.linalg.slogdet(2 * np.pi * cov)[1]
    return float(-0.5 * (off @ np.linalg.solve(cov, off) + size))


def test_the_law_of_one_run_is_as_on_the_page() -> None:
    """The lag from its kernel over drops, the law, and the likelihood as a plain normal density."""
    rate = np.concatenate([np.ones(60), np.linspace(1, 0.1, 40)])
    schedule = Schedule.of(rate)
    steps = np.arange(20, 90, 5)
    loss = 3 + 2 * steps**-0.5 + 0.01 * np.sin(steps)
    seen = laws._observe(Run(schedule=schedule, steps=steps, loss=loss))
    drops = -np.diff(rate, prepend=1.0)
    column = 10
    keep = np.exp(-1 / (laws.TAUS[column] * 100))
    lagged = np.array([1 - sum(drops[j] * (1 - keep ** (k - j)) for j in range(k)) for k in steps])
    assert seen.lag[:, column] == pytest.approx(lagged, rel=1e-9)

    level, share, alpha, drop, noise, wander = 0.01, 0.4, 0.5, 0.06, 0.004, 0.3
    s = np.cumsum(rate)[steps - 1] / np.cumsum(rate)[steps[-1] - 1]
    law = seen.scale * np.exp(level) * (1 - share + share * s**-alpha) * (1 - drop * (1 - lagged))
    x = np.log(s)
    near, far = np.minimum.outer(-x, -x), np.maximum.outer(-x, -x)
    q = rate[steps - 1] - rate[steps[-1] - 1]
    d = laws.ANNEAL_WANDER / 0.2 * 0.047 * seen.scale
    settling = seen.slope * (laws.SETTLING / (s * np.cumsum(rate)[steps[-1] - 1])) ** 2
    error = seen.slope**2 * near**2 * (3 * far - near) / 6
    error = error + d**2 * np.minimum.outer(abs(q), abs(q)) + np.diag(settling**2)
    cov = wander**2 * error + (noise * seen.scale) ** 2 * np.eye(x.size)
    natural = [level, np.log(share / (1 - share)), np.log(alpha), np.log(drop)]
    draw = [*natural, np.log(laws.TAUS[column]), np.log(noise), np.log(wander)]
    own = laws._log_likelihood(np.array([draw]), seen)[0] - x.size / 2 * np.log(2 * np.pi)
    assert own == pytest.approx(log_normal(loss, law, cov), rel=1e-9)


def test_the_law_of_experts_is_as_on_the_page() -> None:
    """Marginal likelihoods in place of the code's, which go by the coefficients."""
    rng = np.random.default_rng(3)
    size = np.repeat([1e7, 3e7, 1e8], 4)
    tokens, experts = 20 * size, np.tile([1.0, 4.0, 16.0, 64.0], 3)
    total = size * (0.4 + 0.6 * experts)
    loss = 1.7 + 0.9 * (size / 1e8) ** -0.3 * experts**-0.08 * np.exp(rng.normal(0, 0.01, 12))
    shape = {"experts": experts, "top_k": np.minimum(experts, 2), "params_total": total}
    names = ["" if e == 1 else "topk" for e in experts]
    points = Points.of(size, tokens, loss, router=names, **shape)
    ahead = points.take([11])
    given = {"params_active": 1e9, "tokens": 2e10, "unique_tokens": 2e10, "params_total": 4e10}
    ahead = dataclasses.replace(ahead, **{name: np.array([v]) for name, v in given.items()})

    def features(n: Any, d: Any, ratio: Any, k: Any, routed: Any) -> Any:
        x, e = np.log(n / 1e8), np.log((1 + 1 / 1024) / (1 / ratio + 1 / 1024))
        parts = [1 + 0 * x, -x, -e, -e * x, e * e, -np.log(k), -np.log(d / 2e9), -e * routed]
        return np.stack(parts, -1)

    f = features(size, tokens, np.maximum(total / size, 1), shape["top_k"], experts > 1)
    g = features(1e9, 2e10, 40.0, 2.0, 1.0)
    less = 0.14  # D grows as N
    m = np.array([0, 0.3 - less, 0.1, 0, 0, 0, 0.3 - less, 0])
    prior = np.diag(np.square([3.0, 0.1, 0.1, 0.005, 0.01, 0.1, 0.1, 0.03]))
    best = int(np.argmin(loss))
    by = 0.42 * (size[best] / 1e9) ** -0.34, 0.42 * (tokens[best] / 2e10) ** -0.34
    rows = []
    for part in np.clip(nodes(1.85 / (1.85 + sum(by)), 0.07, 13), 0.05, 0.97):
        c = part * loss.min()
        for level in (0.003, 0.006, 0.012):
            sd = level * loss / (loss - c)
            cov, y = f @ prior @ f.T + np.diag(sd**2), np.log(loss - c)
            density = log_normal(y, f @ m, cov) - y.sum()
            gain = np.linalg.solve(cov, f @ prior @ g)
            mean = c + np.exp(g @ m + gain @ (y - f @ m))
            spread = g @ prior @ g - gain @ f @ prior @ g
            far = 0.004 * np.log(10)
            rows.append((density, mean, spread * (mean - c) ** 2 + (level**2 + far**2) * mean**2))
    log, mean, variance = np.array(rows).T
    weight = np.exp(log - log.max())
    weight *= weight >= 1e-5
    made = MoeLaw().fit(points).mixture(ahead)
    centre = np.average(mean, weights=weight)
    spread = np.sqrt(np.average(variance + mean**2, weights=weight) - centre**2)
    assert np.ravel(made.moments()) == pytest.approx([centre, spread], rel=1e-7)


def test_the_siblings_are_as_on_the_page() -> None:
    """The regression by its coefficients, where the code has the covariance of the siblings."""
    rng = np.random.default_rng(5)
    n, k = 6, siblings.Constants()
    sizes, levels = -np.arange(1.0, n + 1), 1.2 + 0.05 * rng.standard_normal(n)
    noises, fall = 0.01 * rng.random(n), -1.8 + 0.1 * rng.standard_normal(n)
    fit = siblings.SiblingFit(
        law=siblings.SiblingLaw(),
        end=9,
        level=1.1,
        noise=0.001,
        size=0.0,
        sizes=sizes,
        levels=levels,
        fall=fall,
        noises=noises,
    )
    weight, mean, sd = fit._remaining()
    rows = np.stack([np.ones(n), sizes, levels - 1.1], 1)
    before = np.diag([1 / 3.0**2, 1 / 0.15**2, 1 / 0.7**2])
    m, found_rows = np.array([-1.5, 0.1, 0.0]), []
    grid = itertools.product(0.03 * np.array([0.3, 1, 3]), np.exp(nodes(np.log(0.02), 1.5, 6)))
    for drift, noise in grid:
        own = noise**2 + noises**2 + (drift * sizes) ** 2
        after = np.linalg.inv(before + rows.T @ (rows / own[:, None]))
        b = after @ (before @ m + rows.T @ (fall / own))
        cov = rows @ np.linalg.inv(before) @ rows.T + np.diag(own)
        density = log_normal(fall, rows @ m, cov)
        found_rows.append((density, b[0], np.sqrt(after[0, 0] + noise**2)))
    log, centre, spread = np.array(found_rows).T
    assert mean == pytest.approx(centre, rel=1e-9)
    # The code's is a difference from 9, the prior's variance.
    assert sd**2 == pytest.approx(spread**2, rel=1e-9, abs=9e-11)
    assert weight == pytest.approx(np.exp(log - np.logaddexp.reduce(log)), rel=1e-9)

    final = np.exp(1.1 - np.exp(mean))
    drawn = Mixture(
        weight=weight, mean=final[:, None], sd=(final * np.exp(mean) * sd)[:, None]
    ).quantile([0.5])[0, 0]
    width = (0.25 * 8 + n) / (8 + n)
    at = drawn + width * (final - drawn)
    assert fit.mixture().mean[:, 0] == pytest.approx(at, rel=1e-9)
    extra = np.hypot(0.002, 0.001) * drawn
    wide = np.hypot(width * final * np.exp(mean) * sd, extra)
    assert fit.mixture().sd[:, 0] == pytest.approx(wide, rel=1e-9)
    assert k.width_of(n) == width

    near, far = 0.7, 1.9  # of an Ornstein-Uhlenbeck slope, integrated twice
    cov = ladder_path._integrated_slope(np.array([-near, -far, 1.1]))
    for a, b, sign in ((near, far, 1), (near, 1.1, -1)):
        twice = dblquad(lambda v, u, s=sign: math.exp(-abs(u - s * v)), 0, a, 0, b, epsabs=1e-10)[0]
        assert abs(cov[0, 1 if sign > 0 else 2]) == pytest.approx(twice, rel=1e-5)
    assert cov[0, 2] < 0 < cov[0, 1]


def test_the_line_over_compute_is_as_on_the_page() -> None:
    """One covariance of rungs and target together, by each node."""
    x, y = np.array([-3.0, -1.5, -0.5, 0.0]), np.array([0.08, 0.05, 0.05, 0.04])
    count = np.array([3.0, 2.0, 2.0, 1.0])
    pairs = ((0.003, 3e-4), (0.03, 3e-3))
    line = Trend(
        x=x,
        count=count,
        y=y[None],
        steep=np.ones((1, 4)),
        scatter=np.array([3e-5]),
        freedom=4.0,
        prior=Prior(level=0.02, trend=pairs, lengths=(2.0,)),
    )
    mean, variance = line.solve(x, count, line.steep, 1.5, line.y, 2.0)
    reach = 2.0 * (1 - math.exp(-1.5 / 2.0))
    places = np.append(x, reach)
    near, far = np.minimum.outer(-x, -x), np.maximum.outer(-x, -x)
    logs, at = [], 0
    noises = np.exp(nodes(np.log(0.0015), 1.5, 9))
    rungs = np.exp(nodes(np.log(0.0005), 1.5, 5))
    for noise, rung, (slope, drift) in itertools.product(noises, rungs, pairs):
        cov = 0.02**2 + slope**2 * np.outer(places, places)
        cov[:4, :4] += drift**2 * near**2 * (3 * far - near) / 6
        cov[:4, :4] += np.diag(rung**2 + noise**2 / count)
        cov[4, 4] += drift**2 * 1.5**3 / 3
        pull = np.linalg.solve(cov[:4, :4], cov[:4, 4])
        assert mean[at] == pytest.approx(pull @ y, rel=1e-6)
        assert variance[at] == pytest.approx(cov[4, 4] - pull @ cov[:4, 4], rel=1e-6)
        density = log_normal(y, np.zeros(4), cov[:4, :4])
        logs.append(density - 4 * math.log(noise) - 3e-5 / (2 * noise**2))
        at += 1
    assert line.weight == pytest.approx(
        np.exp(logs - np.logaddexp.reduce(logs)), rel=1e-6, abs=1e-12
    )


class Filter:
    """One hypothesis of the alarms and one drift, as the page has it."""

    def __init__(self) -> None:
        self.state, self.cov = np.zeros(2), np.diag([1e6, 1e8])
        self.nu, self.ss = 2.0, 2.0 * 0.001**2

    def copy(self) -> "Filter":
        other = Filter()
        other.__dict__ |= {k: np.copy(v) for k, v in vars(self).items()}
        return other

    def advance(self, d: float, q: float) -> None:
        move = np.array([[1, d], [0, 1]])
        self.state = move @ self.state
        self.cov = move @ self.cov @ move.T + q * np.array([[d**3 / 3, d**2 / 2], [d**2 / 2, d]])

    def observe(self, y: float) -> float:
        """Log density, then the update."""
        error, own = y - self.state[0], self.cov[0, 0]
        scales = [math.sqrt(self.ss / self.nu * (own + noise)) for noise in (1.0, 20.0**2)]
        shares = (1 - 1e-4, 1e-4)
        parts = [p * t.pdf(error, self.nu, 0, s) for p, s in zip(shares, scales, strict=True)]
        share = parts[0] / sum(parts)
        gain = self.cov[:, 0] / (own + 1 / share)
        self.state = self.state + gain * error
        self.cov = self.cov - np.outer(gain, self.cov[0])
        self.ss = self.ss + share * error**2 / (own + 1 / share)
        self.nu = self.nu + share
        fade = min(1.0, 30 / self.nu)
        self.nu, self.ss = self.nu * fade, self.ss * fade
        return math.log(sum(parts))


def test_the_evidence_for_a_shift_is_as_on_the_page() -> None:
    """A sum over starts, sizes and drifts of plain filters, on a curve that jumps by 2 %."""
    steps = np.arange(5, 55, 5)
    noise = 1e-3 * np.random.default_rng(2).standard_normal(steps.size)
    y = np.log(3 + steps**-0.5) + noise + 0.02 * (steps >= 35)
    drifts, sizes, n = 10.0 ** np.arange(8), (0.003, 0.006, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5), 7
    null = [[0.0, Filter()] for _ in drifts]  # log of weight times likelihood so far, and the state
    others: list[tuple[float, float, list[list[Any]]]] = []
    watch, evidence = ShiftWatch(n), -math.inf
    for i, (step, value) in enumerate(zip(steps, y, strict=True)):
        hypotheses = [(0.0, 0.0, null), *others]
        for _, _, bank in hypotheses:
            for (_, each), q in zip(bank, drifts, strict=True):
                each.advance(math.log(step / steps[i - 1]) if i else 0.0, q)
        if i >= 4:
            prior = math.log(0.5 / n * min(1, (n / (i + 1)) ** 2) / 8)
            others += [(prior, a, [[w, f.copy()] for w, f in null]) for a in sizes]
        for _, a, bank in [(0.0, 0.0, null), *others]:
            for row in bank:
                row[0] += row[1].observe(value - a)
        seen, _ = watch.add(int(step), math.exp(value))
        if others:
            total = np.logaddexp.reduce([w for w, _ in null])
            each = [p + np.logaddexp.reduce([w for w, _ in bank]) - total for p, _, bank in others]
            evidence = float(np.logaddexp.reduce(each))
            assert seen.log_e == pytest.approx(evidence, rel=1e-6, abs=1e-9)
    assert evidence > 0
    assert len(others) == 8 * 6
