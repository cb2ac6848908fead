"""Two real processes over gloo see together the batches that one sees, and each reads its part."""

import json
import socket
import subprocess
import sys
from dataclasses import replace as with_
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from datasets import prose, write
from processes import PATIENCE, ROOT, environment

from jaxmoe import mesh as mesh_lib
from jaxmoe.config import (
    BatchStage,
    CheckpointConfig,
    Config,
    DataConfig,
    LengthStage,
    MeshConfig,
    ModelConfig,
    PhaseConfig,
    SourceConfig,
    TrainConfig,
    as_dict,
)
from jaxmoe.data.heldout_sets import move_to_set
from jaxmoe.data.opened import open_corpus
from jaxmoe.run.loop import Trainer
from jaxmoe.run.progress import Silent

pytestmark = pytest.mark.multiprocess

# 16 x 8 tokens until 300, 8 x 16 until 600, then 16 x 16; other weights from 500 on.
SHAPES = [(16, 8)] * 3 + [(8, 16)] * 2 + [(16, 16)] * 3
RESUMED = 2  # in the first of three shapes

# A process: goes on from the checkpoint, and writes what its devices have of each batch, one batch
# as gloo gathers it from all, and which rows of the stream it asked for.
_CHILD = """
import json, os, sys
from pathlib import Path
import jax, numpy as np
from jax.experimental import multihost_utils
from jaxmoe import config as config_lib, mesh as mesh_lib
from jaxmoe.data.mixture import Mixture
from jaxmoe.data.opened import open_corpus
from jaxmoe.run import platform
from jaxmoe.run.loop import Trainer
from jaxmoe.run.progress import Silent
config, run_dir, out = config_lib.from_json(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
platform.start(config)
mesh, asked, rows = mesh_lib.build(config.mesh), [], Mixture.rows
Mixture.rows = lambda self, *a: (asked.append(a), rows(self, *a))[1]
found = {}
with jax.set_mesh(mesh):
    trainer = Trainer(config, mesh, open_corpus(config), run_dir, Silent(), 1e12)
    step = int(trainer.prepare().step)
    assert trainer.plan.step_of(trainer.tokens) == step
    found["first"] = np.int64(step)
    for step in range(step, config.train.steps):
        batch = trainer.next_batch()
        for name in ("tokens_BL", "weights_BL", "documents_BL", "sources_BY"):
            one = getattr(batch, name)
            assert not one.is_fully_addressable
            for shard in one.addressable_shards:
                start = shard.index[0].start or 0
                found[f"{step}.{name}.{start}"] = np.asarray(shard.data)
    found["gathered"] = multihost_utils.process_allgather(batch.tokens_BL, tiled=True)
    trainer.checkpoints.close()
np.savez(out / f"{jax.process_index()}.npz", **found)
(out / f"{jax.process_index()}.json").write_text(json.dumps(sorted(set(asked))))
"""


def config(folder: Path, mesh: MeshConfig) -> Config:
    mix = (SourceConfig(name="code", weight=3.0), SourceConfig(name="text"))
    phase = PhaseConfig(tokens=500, weights=(("code", 1.0), ("text", 2.0)))
    return Config(
        model=ModelConfig(
            vocab_size=264, d_model=8, n_layers=1, n_heads=2, n_kv_heads=1, d_head=4, d_ff=8,
            n_experts=4, top_k=2, loss_chunk=8,
        ),
        data=DataConfig(
            path=str(folder), sources=mix, phases=(phase,), packing="best_fit", document_mask=True
        ),
        train=TrainConfig(
            steps=len(SHAPES), batch_size=8, seq_len=16,
            batch_ramp=(BatchStage(tokens=600, batch_size=16),),
            length_ramp=(LengthStage(tokens=0, seq_len=8), LengthStage(tokens=300, seq_len=16)),
        ),
        checkpoint=CheckpointConfig(every=2),
        mesh=mesh,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, and a run of one process on eight devices that was stopped at step 2."""
    found = tmp_path_factory.mktemp("two") / "set"
    documents = {
        name: [(f"{name}{i}", f"{i}.txt", prose(f"{name} {i}", 4 + i)) for i in range(20)]
        for name in ("code", "text")
    }
    write(found, documents)
    move_to_set(found, "held", ["code"], lambda *_: None, packages=["code3"])
    data = open_corpus(config(found, MeshConfig())).manifest
    rows = {e["text_fingerprint"]: {} for e in data["heldout"].values()}
    for entry in data["sources"].values():
        for row in rows.values():
            row[entry["fingerprint"]] = {"leaking": 0}
    (found / "manifest.json").write_text(json.dumps({**data, "overlap": rows}))
    return found


def one_process(folder: Path) -> dict[str, np.ndarray]:
    """The batches of the whole run, and a checkpoint in the middle of it."""
    whole = config(folder, MeshConfig(data=8))
    mesh, found = mesh_lib.build(whole.mesh), {}
    with jax.set_mesh(mesh):
        run = Trainer(whole, mesh, open_corpus(whole), folder.parent / "run", Silent(), 1e12)
        state = run.prepare()
        for step in range(whole.train.steps):
            if step == RESUMED:
                run.save(step, with_(state, step=state.step + step))
            batch = run.next_batch()
            assert batch.tokens_BL.shape == (SHAPES[step][0], SHAPES[step][1] + 1)
            for name in ("tokens_BL", "weights_BL", "documents_BL", "sources_BY"):
                found[f"{step}.{name}"] = np.asarray(getattr(batch, name))
        run.checkpoints.close()
    return found


def two_processes(folder: Path, text_cache: Path) -> list[tuple[dict[str, np.ndarray], Any]]:
    """Of each process: what all devices have together, and (step, start, stop) that it read."""
    there = json.dumps(as_dict(config(folder, MeshConfig(data=4, expert=2))))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAXMOE_NUM_PROCESSES": "2"}
    command = [sys.executable, "-c", _CHILD, there, str(folder.parent / "run"), str(folder.parent)]
    children = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**environment(text_cache), **own, "JAXMOE_PROCESS_ID": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [child.communicate(timeout=PATIENCE)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], said[0][-3000:] + said[1][-3000:]
    return [
        (
            dict(np.load(folder.parent / f"{rank}.npz")),
            json.loads((folder.parent / f"{rank}.json").read_text()),
        )
        for rank in range(2)
    ]


def test_two_processes_feed_what_one_does(folder: Path, text_cache: Path):
    """Through a ramp of batch and length, a phase, packing, and from a checkpoint in the middle."""
    alone = one_process(folder)
    both = two_processes(folder, text_cache)
    left = {k: v for k, v in alone.items() if int(k.split(".")[0]) >= RESUMED}
    for found, _ in both:
        assert found.pop("first") == RESUMED
        assert np.array_equal(found.pop("gathered"), alone[f"{len(SHAPES) - 1}.tokens_BL"])
    for name, array in left.items():
        parts = {int(k.rpartition(".")[2]): v for f, _ in both for k, v in f.items() if name in k}
        assert np.array_equal(np.concatenate([parts[n] for n in sorted(parts)]), array), name
    assert len({alone[f"{step}.tokens_BL"].shape for step in range(RESUMED, len(SHAPES))}) == 3
    assert all(len(np.unique(v)) > 1 for k, v in left.items() if k.endswith("sources_BY"))
    for step in range(RESUMED, len(SHAPES)):
        read = [{r for s, a, b in asked if s == step for r in range(a, b)} for _, asked in both]
        assert not read[0] & read[1]
        assert read[0] | read[1] == set(range(SHAPES[step][0]))
        assert len(read[0]) == len(read[1])
