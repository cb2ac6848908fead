"""Parameters alone, read slice by slice: of a run's checkpoint, or as `jaxmoe.convert` wrote them.

A folder of parameters is `config.json` ({"format", "model", ...}) beside `params/`, where each leaf
of the Specs is a zarr array named by its path with dots, as orbax lays out a checkpoint without
OCDBT. A run's checkpoint has the same arrays in OCDBT. Both are read through tensorstore, so a
process reads the slices that its devices hold, and nothing else.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore

from jaxmoe import config as config_lib
from jaxmoe import tree
from jaxmoe.config import ModelConfig
from jaxmoe.errors import UserError
from jaxmoe.model.lm import lm_specs
from jaxmoe.outside import loads, reading
from jaxmoe.run import record, seal
from jaxmoe.run.checkpoint import ITEMS
from jaxmoe.spec import is_spec

FORMAT = "jaxmoe-params-1"
DTYPES = ("float32", "bfloat16", "float16", "float64")
CONFIG, ARRAYS, TOKENIZER = record.CONFIG, "params", "tokenizer"

# Fields of `model` that no logit depends on.
TRAINING_ONLY = (
    *("z_loss_coef", "mtp_coef", "loss_chunk", "dtype", "matmul", "remat", "router.jitter"),
    *("attention_path", "context_attention", "expert_path", "expert_exchange"),
    *("router.load_balance_coef", "router.load_balance_scope", "router.z_coef"),
)


class Params:
    """Arrays by leaf name.

    Attributes:
        model: their shape.
        about: what else the folder's config.json says (for a run: nothing).
        tokenizer: folder or file of the tokenizer that belongs to them; None if there is none.
        seq_len: of the run they come from; None if they do not.
    """

    def __init__(
        self,
        model: ModelConfig,
        kvstore: Callable[[str], Any],
        about: dict[str, Any],
        where: Path,
    ) -> None:
        """`kvstore(leaf with dots)` is the tensorstore spec of where the leaf lies."""
        self.model, self.about, self.where = model, about, where
        self.tokenizer: Path | None = None
        self.seq_len: int | None = None
        self._kvstore = kvstore
        self.rounds = 1  # of the pipeline, for which a run's layers were stacked
        self._open: dict[str, Any] = {}

    def array(self, name: str) -> Any:
        """The leaf as a tensorstore: it has shape and dtype, and is read by indexing.

        Raises:
            UserError: there is no such leaf.
        """
        if name not in self._open:
            spec = {"driver": "zarr", "kvstore": self._kvstore(name.replace("/", "."))}
            try:
                array = tensorstore.open(spec, read=True, open=True).result()
                self._open[name] = self._by_layer(name, array)
            except (ValueError, IndexError) as error:
                raise UserError(f"{self.where}: parameter {name} is missing") from error
        return self._open[name]

    def _by_layer(self, name: str, array: Any) -> Any:
        """[rounds, layers of a round, ...] as [layers, ...]; a view."""
        if self.rounds == 1:
            return array
        specs = dict(tree.named_leaves(lm_specs(self.model), is_leaf=is_spec))
        if specs[name].axes[0] != "layers":
            return array
        return tensorstore.concat([array[k] for k in range(self.rounds)], axis=0)

    def read(self, name: str, index: Any = ()) -> np.ndarray:
        with reading(f"{self.where}: parameter {name}"):
            return self.array(name)[index].read().result()

    def check(self, shapes: Any) -> None:
        """Raises UserError unless the leaves of `shapes` (anything with a shape) are all here."""
        for name, leaf in tree.named_leaves(shapes, is_leaf=is_spec):
            array = self.array(name)
            shape = tuple(array.shape)
            if array.dtype.name not in DTYPES:
                raise UserError(
                    f"{self.where}: parameter {name} is {array.dtype.name}; they are"
                    f" {' or '.join(DTYPES)}"
                )
            if shape != leaf.shape:
                raise UserError(
                    f"{self.where}: parameter {name} has the shape {shape}, and model.* asks for"
                    f" {leaf.shape}"
                )

    def differences(self, model: ModelConfig) -> list[str]:
        """`key: theirs -> ours` of what decides the logits, such as RoPE's scaling."""
        whole = config_lib.Config
        unused = ("d_head",) if model.mla is not None else ()
        return [
            line.removeprefix("model.")
            for line in config_lib.diff(whole(model=self.model), whole(model=model))
            if line.partition(":")[0].removeprefix("model.") not in (*TRAINING_ONLY, *unused)
        ]

    def load(self, abstract: Any) -> Any:
        """The whole tree as float32 arrays on the shardings of `abstract`, a tree of
        ShapeDtypeStruct.

        Raises:
            UserError: a leaf is missing or has another shape.
        """
        self.check(abstract)

        def one(name: str, leaf: Any) -> jax.Array:
            def shard(index: Any) -> np.ndarray:
                return self.read(name, index).astype(np.float32)

            return jax.make_array_from_callback(leaf.shape, leaf.sharding, shard)

        return tree.map_named(one, abstract)


def open_params(where: Path) -> Params:
    """A folder of parameters, a run's folder (its newest whole checkpoint), or one checkpoint of a
    run.

    Raises:
        UserError: it is none of them, or no checkpoint is whole.
    """
    where = where.absolute()
    if (where / record.CHECKPOINTS).is_dir():
        return _of_run(where, _newest(where / record.CHECKPOINTS))
    if where.parent.name == record.CHECKPOINTS and where.name.isdecimal() and where.is_dir():
        if (reason := seal.problem(where, ITEMS)) is not None:
            raise UserError(f"{where}: not a whole checkpoint: {reason}")
        return _of_run(where.parents[1], where)
    try:
        about = loads((where / CONFIG).read_text())
        if about.get("format") != FORMAT:
            raise ValueError(f"its format is {about.get('format')!r}, not {FORMAT!r}")
        model = config_lib.model_from_dict(about["model"])
    except (OSError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{where}: no parameters here ({error}); give a folder that jaxmoe.convert wrote, or a"
            " run's"
        ) from error
    params = Params(model, lambda leaf: f"file://{where / ARRAYS / leaf}/", about, where)
    tokenizer = where / TOKENIZER
    params.tokenizer = tokenizer if tokenizer.is_dir() else None
    return params


def _of_run(run_dir: Path, checkpoint: Path) -> Params:
    config = record.read_config(run_dir)
    base = f"file://{checkpoint / 'state'}/"

    def kvstore(leaf: str) -> dict[str, str]:
        return {"driver": "ocdbt", "base": base, "path": f"params.{leaf}/"}

    params = Params(config.model, kvstore, {}, checkpoint)
    params.seq_len, params.rounds = config.train.seq_len, config.mesh.rounds
    tokenizer = run_dir / record.TOKENIZER
    params.tokenizer = tokenizer if tokenizer.is_file() else None
    return params


def _newest(folder: Path) -> Path:
    steps = sorted((int(f.name) for f in folder.iterdir() if f.name.isdecimal()), reverse=True)
    reasons = []
    for step in steps:
        reason = seal.problem(folder / str(step), ITEMS)
        if reason is None:
            return folder / str(step)
        reasons.append(f"{step}: {reason}")
    raise UserError(f"{folder}: no whole checkpoint ({'; '.join(reasons) or 'it is empty'})")
