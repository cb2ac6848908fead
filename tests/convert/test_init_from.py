"""A run that starts from converted parameters begins where they stand, on any mesh."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from meshes import on
from processes import events, finish, lines, run, train

from jaxmoe import tree
from jaxmoe.config import RopeConfig, replace
from jaxmoe.errors import UserError
from jaxmoe.run import record
from jaxmoe.run.params import open_params
from jaxmoe.run.state import abstract_state

MESH = ("mesh.data=2", "mesh.expert=2", "mesh.model=2")
SHORT = ("train.steps=2", "eval.every=2", "forecast.first=2", "forecast.every=2")
NEW_DATA = "data.max_bytes=399999"  # not in any cache


def sets(*items: str) -> list[str]:
    return [word for item in items for word in ("--set", item)]


@pytest.fixture(scope="module")
def started_from(
    returned: Path, text_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of eight devices, from a run of one that went to a Hugging Face folder and back."""
    run_dir = tmp_path_factory.mktemp("started") / "run"
    origin = f"checkpoint.init_from={returned}"
    finish(train(run_dir, *sets(*MESH, *SHORT, origin)), text_cache)
    return run_dir


def test_the_first_eval_is_the_last_of_the_run_they_come_from(
    started_from: Path, straight: Path
) -> None:
    before, after = lines(straight / record.EVALS), lines(started_from / record.EVALS)
    last = next(row for row in before if row["step"] == 24)
    assert after[0]["step"] == 0
    assert after[0]["nll"] == pytest.approx(last["nll"], abs=1e-6)
    assert abs(before[0]["nll"] - last["nll"]) > 0.01  # it had learnt something
    assert after[-1]["step"] == 2 and after[-1]["nll"] != after[0]["nll"]


def test_the_record_says_where_they_come_from(started_from: Path, returned: Path) -> None:
    (row,) = events(started_from, "init")
    assert row["step"] == 0 and str(returned) in row["why"]
    assert not (started_from / "checkpoints" / "0").exists()


def test_a_run_itself_may_be_given(straight: Path, returned: Path) -> None:
    """Its folder, or a checkpoint of it; the same parameters as those that went out and back."""
    config = record.read_config(straight)
    mesh = on(data=2, expert=2, model=2)
    abstract = abstract_state(config, mesh).params
    with jax.set_mesh(mesh):
        trees = [
            open_params(where).load(abstract)
            for where in (returned, straight, straight / "checkpoints" / "24")
        ]
    for (name, want), (_, a), (_, b) in zip(*map(tree.named_leaves, trees), strict=True):
        assert want.sharding == a.sharding and want.dtype == np.float32
        np.testing.assert_array_equal(want, a, err_msg=name)
        np.testing.assert_array_equal(want, b, err_msg=name)
    wq = dict(tree.named_leaves(trees[0]))["layers/0/0/attention/wq_DNH"]
    assert wq.addressable_shards[0].data.size < wq.size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "model.d_ff=40",
            "layers/0/0/ffn/experts/wgate_EDF has the shape (2, 8, 16, 20), and model.* asks for"
            " (2, 8, 16, 40)",
        ),
        ("checkpoint.init_from=/no/such/folder", "/no/such/folder: no parameters here"),
    ],
)
def test_what_does_not_fit_is_said_before_any_work(
    returned: Path, text_cache: Path, tmp_path: Path, change: str, message: str
) -> None:
    """One line, exit code 2, nothing written, no data read."""
    items = sets(NEW_DATA, f"checkpoint.init_from={returned}", change)
    done = run(train(tmp_path / "run", *items), text_cache)
    assert done.returncode == 2
    assert done.stderr.startswith("jaxmoe.train: ") and done.stderr.count("\n") == 1
    assert message in done.stderr
    assert "data:" not in done.stdout
    assert not (tmp_path / "run").exists()


def test_another_model_of_the_same_shape_is_noted(straight: Path) -> None:
    """What decides the logits and has no shape."""
    stored = open_params(straight)
    assert stored.differences(stored.model) == []
    other = replace(
        stored.model,
        rope=RopeConfig(theta=5.0),
        top_k=3,
        tie_embeddings=True,
        sliding_window=7,
        loss_chunk=4,
        router=replace(stored.model.router, norm_top_k=False, z_coef=0.5),
    )
    found = {line.partition(":")[0] for line in stored.differences(other)}
    assert found == {"rope.theta", "top_k", "tie_embeddings", "sliding_window", "router.norm_top_k"}


def test_a_missing_leaf_is_named(returned: Path) -> None:
    stored = open_params(returned)
    with pytest.raises(UserError, match="parameter head_VD is missing"):
        stored.read("head_VD")


def test_an_interrupted_fresh_run_goes_on_and_does_not_start_over(
    started_from: Path, returned: Path, text_cache: Path, tmp_path: Path
) -> None:
    """With the same command: from its checkpoint, and init_from is not read again."""
    moved = tmp_path / "run"
    shutil.copytree(started_from, moved)
    items = sets(*MESH, *SHORT, f"checkpoint.init_from={returned}")
    done = run(train(moved, *items), text_cache)
    assert done.returncode == 0 and "is finished" in done.stdout
    gone = run(train(moved, *sets(*MESH, *SHORT, "checkpoint.init_from=/gone")), text_cache)
    assert gone.returncode == 0 and "is finished" in gone.stdout


def test_params_of_another_format_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"format": "jaxmoe-params-2", "model": {}}')
    with pytest.raises(UserError, match="its format is 'jaxmoe-params-2'"):
        open_params(tmp_path)
