"""What a line of metrics.jsonl says of the experts."""

import json
from typing import Any

import jax
import numpy as np
import pytest
from scipy.stats import entropy
from small import small

from jaxmoe.config import Config, RouterConfig, replace
from jaxmoe.kernels.cross_entropy import LossSums
from jaxmoe.model.router import RouterStats
from jaxmoe.run.meter import CodeLength, Meter
from jaxmoe.run.step import StepMetrics

PER_LAYER = ("load_min", "load_max", "load_entropy", "dead", "drop_rate", "load_balance")
PER_LAYER += ("router_z",)


def stats(load_XE: Any) -> RouterStats:
    """Of layers with these loads; the rest tells layers apart."""
    load_XE = np.asarray(load_XE, np.float32)
    layer_X = np.arange(1, len(load_XE) + 1, dtype=np.float32)
    return RouterStats(
        load_E=load_XE,  # pyright: ignore[reportArgumentType]
        load_balance=1 + layer_X / 8,  # pyright: ignore[reportArgumentType]
        router_z=layer_X / 4,  # pyright: ignore[reportArgumentType]
        bias_low=-layer_X,  # pyright: ignore[reportArgumentType]
        bias_high=2 * layer_X,  # pyright: ignore[reportArgumentType]
        overflow=layer_X % 2,  # pyright: ignore[reportArgumentType]
    )


def line(router: RouterStats | None, config: Config | None = None, mtp: Any = ()) -> Any:
    """As it is read back from the file."""
    one: Any = np.float32(1)
    sums = LossSums(**{name: one for name in LossSums.__dataclass_fields__})
    nlls: Any = np.asarray(mtp, np.float32)
    metrics = StepMetrics(sums=sums, router=router, mtp_nll=nlls, grad_norm=one)
    made = Meter(config or small(), peak=1e12).line(3, metrics)
    return json.loads(json.dumps(made, allow_nan=False))


def random_load(layers: int, experts: int) -> np.ndarray:
    load_XE = np.random.default_rng(0).gamma(2.0, size=(layers, experts))
    return load_XE * experts / load_XE.sum(1, keepdims=True)


def test_each_layer_has_its_own_numbers_and_the_scalars_are_over_all():
    load_XE = random_load(3, 8)
    load_XE[1, 2] = 0
    load_XE[1] *= 8 / load_XE[1].sum()
    row = line(stats(load_XE))
    np.testing.assert_allclose(row["moe/layer/load_min"], load_XE.min(1), rtol=1e-5)
    np.testing.assert_allclose(row["moe/layer/load_max"], load_XE.max(1), rtol=1e-5)
    even = entropy(load_XE, axis=1, base=8)
    np.testing.assert_allclose(row["moe/layer/load_entropy"], even, rtol=1e-5)
    assert row["moe/layer/dead"] == [0, 1, 0]
    assert row["moe/layer/load_balance"] == [1.125, 1.25, 1.375]
    assert row["moe/layer/router_z"] == [0.25, 0.5, 0.75]
    np.testing.assert_allclose(row["moe/load"], load_XE, atol=1e-4)
    assert row["moe/load_min"] == 0
    assert row["moe/load_max"] == pytest.approx(load_XE.max())
    assert row["moe/load_entropy_min"] == pytest.approx(even.min())
    assert row["moe/dead_experts"] == 1
    assert (row["moe/load_balance"], row["moe/router_z"]) == (1.25, 0.5)
    assert row["moe/layer/overflow"] == [1.0, 0.0, 1.0]
    assert row["moe/overflow_rate"] == pytest.approx(2 / 3)


def test_entropy_is_one_where_even_and_zero_with_one_expert():
    alone = [0.0] * 7 + [8.0]
    row = line(stats([[1.0] * 8, alone]))
    assert row["moe/layer/load_entropy"] == [1.0, 0.0]
    assert row["moe/layer/dead"] == [0, 7]


def test_dead_is_less_than_a_hundredth_of_an_even_share():
    row = line(stats([[0.0, 0.0099, 0.0101, 1.0] + [1.0] * 4]))
    assert row["moe/layer/dead"] == [2]


@pytest.mark.parametrize(("layers", "experts", "there"), [(16, 64, True), (41, 25, False)])
def test_the_load_of_each_expert_is_left_out_beyond_1024_values(
    layers: int, experts: int, there: bool
):
    row = line(stats(random_load(layers, experts)))
    assert ("moe/load" in row) == there
    assert all(len(row[f"moe/layer/{key}"]) == layers for key in PER_LAYER)


def test_a_line_of_a_very_large_model_stays_short():
    """58 layers x 256 experts: the loads alone would be 100 kB."""
    router = stats(random_load(58, 256))
    router = jax.tree.map(lambda values: values * np.float32(np.pi), router)  # digits to the end
    assert len(json.dumps(line(router, with_bias(0.001)))) < 6_000


def with_bias(rate: float | None) -> Config:
    config = small()
    router = RouterConfig(balance_bias_rate=rate)
    return replace(config, model=replace(config.model, router=router))


@pytest.mark.parametrize("rate", [None, 0.0, 0.001])
def test_the_range_of_the_bias_is_there_with_a_bias(rate: float | None):
    """Also where it is only used, and not moved."""
    row = line(stats(random_load(2, 8)), with_bias(rate))
    found = (row.get("moe/layer/bias_low"), row.get("moe/layer/bias_high"))
    assert found == ((None, None) if rate is None else ([-1, -2], [2, 4]))


def test_a_dense_model_has_no_word_of_experts():
    row = line(None)
    assert [key for key in row if key.startswith("moe")] == []
    view = Meter(small(), peak=1e12).view(3, row, {})
    assert not any("expert" in word for word in view.words())


def test_further_tokens_have_a_loss_each_where_there_are_some():
    assert line(None, mtp=(2.5, 3.5))["train/mtp_nll"] == [2.5, 3.5]
    assert "train/mtp_nll" not in line(None)


def test_the_view_counts_the_dead():
    row = line(stats([[0.0] * 2 + [4 / 3] * 6] * 2))
    view = Meter(small(), peak=1e12).view(3, row, {})
    assert view.words()[-1] == "expert load 0.00..1.33, 4 dead"


def test_code_length_is_told_in_all_and_by_source():
    """In bits; of one source it is the sum, and a run that began without it has none."""
    code = CodeLength()
    code.add("text", np.log(2) * 6, 3)
    assert code.line() == {"data/code_bits": pytest.approx(6), "data/code_tokens": 3}
    code.add("code", np.log(2) * 4, 5)
    code.add("text", np.log(2), 1)
    found = code.line()
    assert found["data/code_bits"] == pytest.approx(11) and found["data/code_tokens"] == 9
    assert found["data/code_bits/text"] == pytest.approx(7)
    assert (found["data/code_tokens/text"], found["data/code_tokens/code"]) == (4, 5)
    assert CodeLength(known=False).line() == {}
