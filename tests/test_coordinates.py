"""The coordinate check, and that a wrong rule fails it."""

import functools
import json
from typing import Any

import jax
import pytest
from meshes import on

from jaxmoe import coordinates, transfer
from jaxmoe.config import Config, replace
from jaxmoe.coordinates import LIMIT, Row, main, ratios, read, scaled

FACTORS = {"width": 16, "depth": 8}


def rows(config: Config, axis: str) -> list[Row]:
    return [base_row(config), read(scaled(config, **{axis: FACTORS[axis]}), on())]


@functools.cache
def base_row(config: Config) -> Row:
    """At the base every rule is 1, right or wrong."""
    return read(scaled(config), on())


def worst(found: list[Row]) -> float:
    return max(ratios(found).values())


def config(name: str = "adamw", **optim: Any) -> Config:
    base = coordinates.base()
    return replace(base, optim=replace(base.optim, name=name, **optim))


@pytest.mark.parametrize(
    "axis",
    [
        "width",
        "depth",
        pytest.param("muon width", marks=pytest.mark.slow),
        pytest.param("muon depth", marks=pytest.mark.slow),
    ],
)
def test_activations_and_their_changes_are_flat(axis: str) -> None:
    name, axis = axis.split() if " " in axis else ("adamw", axis)
    # An update of Muon is a fifth of Adam's at the same rate.
    found = rows(config(name, lr=1e-2 if name == "adamw" else 4e-2), axis)
    assert set(found[0].sizes) == {
        "attention",
        "embedding",
        "experts",
        "logits",
        "router",
        "stream",
    }
    assert worst(found) <= LIMIT, ratios(found)


# Rule of transfer.py, what it is wrongly, the axis on which that shows, and in what.
WRONG = {
    "adam_rate": (lambda spec: 1.0, "width", "changes/experts"),
    # As wide as in the base, at every width.
    "init_gain": (
        lambda spec: (spec.fan_in / spec.tuned.fan_in) ** 0.5,
        "width",
        "sizes/experts",
    ),
    "residual_scale": (lambda cfg: 1.0, "depth", "sizes/stream"),
}


@pytest.mark.slow
@pytest.mark.parametrize("rule", WRONG)
def test_a_wrong_rule_is_not_flat(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, axis, reading = WRONG[rule]
    base_row(config())
    jax.clear_caches()  # programs know the rules as they were traced
    monkeypatch.setattr(transfer, rule, wrong)
    try:
        found = ratios(rows(config(), axis))
    finally:
        jax.clear_caches()
    assert found[reading] > LIMIT, found


def test_ratio_is_of_the_largest_to_the_smallest() -> None:
    def row(width: int, size: float, change: float) -> Row:
        return Row(width=width, depth=1, sizes={"a": size}, changes={"a": change})

    found = ratios([row(1, 2.0, 0.5), row(4, 3.0, 0.1), row(16, 1.0, 0.4)])
    assert found == pytest.approx({"sizes/a": 3.0, "changes/a": 5.0})


def test_scaled_keeps_the_rates_and_names_the_base() -> None:
    base = coordinates.base()
    large = scaled(base, width=4, depth=2)
    m = large.model
    assert (m.d_model, m.n_heads, m.d_head, m.d_ff, m.n_layers) == (128, 8, 16, 64, 4)
    assert m.transfer == transfer.tuned_at(base.model) and large.optim == base.optim
    assert scaled(large, width=2).model.transfer == m.transfer


def test_the_command_says_what_is_not_flat(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(size: float) -> Any:
        return lambda one, mesh: Row(
            width=one.model.d_model,
            depth=one.model.n_layers,
            sizes={"router": size if one.model.d_model > 32 else 1.0},
            changes={"router": 1.0},
        )

    # Devices are up already.
    monkeypatch.setattr(coordinates.platform, "start", lambda config: None)
    monkeypatch.setattr(coordinates, "read", made(1.4))
    assert main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ratios"]["width"]["sizes/router"] == 1.4
    monkeypatch.setattr(coordinates, "read", made(1.6))
    assert main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "not flat" in line and "sizes/router" in line]
    assert main(["--set", "optim.nam=muon"]) == 2
    assert "did you mean 'name'" in capsys.readouterr().err
