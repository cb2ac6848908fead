"""The dial: what each rung keeps, and what follows it."""

from pathlib import Path
from typing import Any

import pytest

from jaxmoe import config as config_lib
from jaxmoe import transfer
from jaxmoe.config import replace
from jaxmoe.config_check import check
from jaxmoe.config_file import import_file
from jaxmoe.forecast.rate_law import PowerLaw
from jaxmoe.model.cost import cost

FILE = Path(__file__).parents[1] / "configs" / "ladder.py"
LADDER = import_file(FILE)
FAMILIES = {"dense": 1, "moe": 8, "many": 32}
RUNGS = range(42)
# What a rung may set; all else is the family's.
VARY = {
    "model": ("d_model", "n_layers", "d_head", "d_ff"),
    "optim": ("lr", "warmup_steps", "weight_decay"),
    "train": ("steps", "batch_size"),
    "eval": ("every",),
    "checkpoint": ("every",),
    "forecast": ("first", "every"),
    "name": (),
}


def recipe(config: Any) -> Any:
    kept = config_lib.as_dict(config)
    for part, keys in VARY.items():
        for key in keys:
            del kept[part][key]
    del kept["name"]
    return kept


@pytest.mark.parametrize("experts", FAMILIES.values(), ids=list(FAMILIES))
def test_rungs_are_of_one_recipe_and_keep_the_ratios(experts: int) -> None:
    rungs = [LADDER.rung(k, experts=experts) for k in RUNGS]
    flops = []
    for config in rungs:
        check(config)
        assert recipe(config) == recipe(rungs[0])
        m, t, o = config.model, config.train, config.optim
        counted = cost(m, t.seq_len)
        tokens = t.steps * config.tokens_per_step
        assert tokens == pytest.approx(80 * counted.params_active, rel=0.01)
        assert (m.n_heads * m.d_head, m.d_ff * m.top_k) == (m.d_model, 3 * m.d_model)
        # The weights' timescale is half of the run, warm-up a twentieth.
        assert o.lr * o.weight_decay * t.steps == pytest.approx(1 / LADDER.TIMESCALE)
        assert o.warmup_steps == pytest.approx(0.05 * t.steps, rel=0.05)
        flops.append(LADDER.row(config)["flops"])
        assert flops[-1] == tokens // t.seq_len * counted.flops_per_sequence
    assert flops == sorted(flops)
    assert all(b / a < 2.5 for a, b in zip(flops, flops[1:], strict=False))
    assert len({config.model.n_layers for config in rungs}) == 2


def test_the_batch_follows_the_root_of_the_tokens() -> None:
    small, large = LADDER.rung(4), LADDER.rung(40)
    tokens = [c.train.steps * c.tokens_per_step for c in (small, large)]
    batches = [c.train.batch_size for c in (small, large)]
    assert batches[1] / batches[0] == pytest.approx((tokens[1] / tokens[0]) ** 0.5, rel=0.05)


def test_the_rate_makes_up_for_a_rounded_batch() -> None:
    """As many tokens at noise of the same scale: lr^2 / batch is that of the base rung."""
    base = LADDER.rung(LADDER.BASE)
    tokens = cost(base.model, 256).params_active
    rounded = []
    for k in range(8):
        config = LADDER.rung(k)
        ideal = 3 * (cost(config.model, 256).params_active / tokens) ** 0.5
        rounded.append(config.train.batch_size / ideal)
        assert config.optim.lr == pytest.approx(1e-2 * rounded[-1] ** 0.5)
    assert min(rounded) < 0.9 and max(rounded) > 1.1


@pytest.mark.parametrize("experts", [1, 8])
def test_the_first_rungs_are_small_beside_the_target(experts: int) -> None:
    """Four rungs over more than half a decade, none above 1/300 of the target."""
    target = LADDER.target_dense() if experts == 1 else LADDER.target_moe()
    whole = LADDER.row(target)["flops"]
    flops = [LADDER.row(LADDER.rung(k, experts=experts))["flops"] for k in range(4)]
    assert flops[-1] < whole / 300 and flops[-1] / flops[0] > 5
    assert 1.5e14 < whole < 4e14  # about an hour or more of two cores at 50 GFLOP/s


def test_active_parameters_are_those_of_the_dense_rung_and_the_router() -> None:
    for k in (0, 5, 32):
        dense, moe = (cost(LADDER.rung(k, experts=e).model, 256) for e in (1, 8))
        assert moe.params_active - dense.params_active == moe.groups["router"]


def test_a_longer_horizon_is_the_same_run_until_its_rate_falls() -> None:
    one, two = LADDER.rung(3), LADDER.rung(3, horizon=2)
    assert abs(two.train.steps - 2 * one.train.steps) <= 1
    assert two.optim.warmup_steps == one.optim.warmup_steps and two.optim.lr == one.optim.lr
    assert (two.train.batch_size, two.model) == (one.train.batch_size, one.model)


def test_every_rung_names_the_base_and_the_base_is_one_of_them() -> None:
    base = LADDER.rung(LADDER.BASE)
    assert base.model.transfer == transfer.tuned_at(base.model)
    assert LADDER.rung(9).model.transfer == base.model.transfer


def test_fitted_laws_are_taken() -> None:
    end = (0.0, 0.0)
    lr = PowerLaw(scale=4e-3, power=-0.3, at=1e6, scale_interval=end, power_interval=end)
    batch = replace(lr, scale=2048, power=0.4)
    config = LADDER.rung(3, laws={"lr": lr, "batch": batch})
    tokens = 80 * cost(config.model, 256).params_active
    sequences = 2048 * (tokens / 1e6) ** 0.4 / 256
    assert config.train.batch_size == round(sequences)
    rounded = (config.train.batch_size / sequences) ** 0.5
    assert config.optim.lr == pytest.approx(4e-3 * (tokens / 1e6) ** -0.3 * rounded)
    assert config.optim.lr * config.optim.weight_decay * config.train.steps == pytest.approx(2)


def test_the_table_has_every_rung(capsys: pytest.CaptureFixture[str]) -> None:
    LADDER.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line[:4].strip().isdigit()] == [
        *map(str, range(8)),
        "32",
    ] * 2
    assert config_lib.load(f"{FILE}:target_moe").name == "target_moe"
