"""Moves tensors between a Hugging Face folder and a folder of parameters, one at a time."""

import base64
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxmoe import config as config_lib
from jaxmoe.convert import families, safetensors
from jaxmoe.convert.links import Link, links
from jaxmoe.convert.quantised import Source, unpacked
from jaxmoe.convert.store import Store, copy_to
from jaxmoe.data.tokenizer import SPECIALS
from jaxmoe.errors import UserError
from jaxmoe.model.lm import lm_specs
from jaxmoe.outside import group, json_object, reading
from jaxmoe.run.params import CONFIG, FORMAT, TOKENIZER, Params, open_params

Progress = Callable[[str, int, int], None]  # name of a tensor, bytes done, bytes in all

DTYPES = {"float32": np.dtype("<f4"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
# What a tokenizer may consist of, and what generation reads.
CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
# Of a config.json that came in: true of its tensors, or of code beside it, and not of ours.
OUTDATED = ("quantization_config", "torch_dtype", "auto_map", "transformers_version")
MOST_LAYERS, MOST_EXPERTS = 10_000, 10_000_000
SLAB = 1 << 24  # values held at one time where a tensor may come in pieces
SHARD = 4 << 30  # bytes of a safetensors file


def from_hf(folder: Path, to: Path, progress: Progress) -> dict[str, Any]:
    """A folder as `save_pretrained` or the hub has it -> a folder of parameters.

    Returns:
        What the new config.json says.

    Raises:
        UserError: a tensor is missing, unknown or has another shape; an architecture or feature
            that is not ours; `to` exists. Nothing is written then.
    """
    hf = _read_json(folder / CONFIG)
    family, cfg = _model_of(folder / CONFIG, hf)
    sources = unpacked(safetensors.tensors(folder))
    wanted = links(cfg, family.layout)
    _compare(folder, wanted, sources)
    wanted = [k for k in wanted if k.name in sources]
    part = _begin(to)
    store: Store | None = None
    try:
        specs = lm_specs(cfg)
        store = Store(part, specs, _dtypes(wanted, sources))
        total = sum(_bytes(k.shape, sources[k.name].dtype) for k in wanted)
        done = 0
        for link in wanted:
            _bring(link, sources[link.name], store, folder)
            done += _bytes(link.shape, sources[link.name].dtype)
            progress(link.name, done, total)
        _carry(folder, part / TOKENIZER)
        about = {
            "format": FORMAT,
            "model": config_lib.as_dict(cfg),
            "hf": hf,
            "source": {"folder": folder.name, "model_type": family.model_type},
        }
        store.finish(about)
        os.replace(part, to)
    except BaseException:
        if store is not None:
            store.abandon()
        shutil.rmtree(part, ignore_errors=True)
        raise
    return about


def _model_of(file: Path, hf: dict[str, Any]) -> tuple[families.Family, config_lib.ModelConfig]:
    """Raises UserError: of another architecture or feature, or with values that no model has."""
    mend = "give one as transformers writes it"
    with reading(file, mend):
        layers = hf.get("num_hidden_layers", 0)
        if layers > MOST_LAYERS:  # each has tensors, whose names are listed
            raise UserError(f"{file}: num_hidden_layers={layers} is too many; {mend}")
        family, cfg = families.from_hf(hf)
    if cfg.n_mtp > MOST_LAYERS or cfg.n_layers * cfg.n_experts > MOST_EXPERTS:
        counts = f"{cfg.n_layers} + {cfg.n_mtp} layers of {cfg.n_experts} experts"
        raise UserError(f"{file}: {counts} are too many; {mend}")
    if cfg.n_mtp and cfg.tie_embeddings:  # their modules repeat the head, and there is none
        raise UserError(
            f"{file}: tie_word_embeddings is not supported with num_nextn_predict_layers"
        )
    return family, cfg


def to_hf(
    where: Path, to: Path, dtype: str | None, progress: Progress, shard: int = SHARD
) -> tuple[dict[str, Any], Path]:
    """A folder of parameters, a run or one of its checkpoints -> a folder that transformers loads.

    Args:
        dtype: of the tensors; None: as they are stored.
        shard: bytes of a file at most, unless one tensor is larger.

    Returns:
        The new config.json, and the folder that was read (of a run: which checkpoint).
    """
    params = open_params(where)
    family, hf = families.to_hf(params.model)
    wanted = [k for k in links(params.model, family.layout) if not k.copy]
    params.check(lm_specs(params.model))
    types = [DTYPES[dtype] if dtype else _stored(k, params) for k in wanted]
    entries = [(k.name, t, k.shape) for k, t in zip(wanted, types, strict=True)]
    plans, index = safetensors.plan_files(entries, shard)
    of_name = {k.name: k for k in wanted}
    part = _begin(to)
    try:
        part.mkdir(parents=True)
        total, done = sum(_bytes(shape, t) for _, t, shape in entries), 0
        for plan in plans:
            with safetensors.Writer(part, plan) as writer:
                for name, t, shape in plan.entries:
                    writer.write(name, _gathered(of_name[name], t, params))
                    done += _bytes(shape, t)
                    progress(name, done, total)
        if index is not None:
            (part / safetensors.INDEX).write_text(json.dumps(index, indent=2) + "\n")
        kept = {k: v for k, v in group(params.about, "hf").items() if k not in OUTDATED}
        written = {**kept, **hf, "dtype": types[0].name}
        if params.seq_len is not None:
            written["max_position_embeddings"] = params.seq_len
        _write_tokenizer(params, part, written)
        (part / CONFIG).write_text(json.dumps(written, indent=2) + "\n")
        os.replace(part, to)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return written, params.where


# In


def _compare(folder: Path, wanted: list[Link], sources: dict[str, Source]) -> None:
    """Names every kind of disagreement, with a few examples of each."""
    names = {k.name for k in wanted}
    missing = [k.name for k in wanted if not k.copy and k.name not in sources]
    # Written by some old versions of transformers; computed, not learnt.
    extra = [n for n in sources if n not in names and not n.endswith("rotary_emb.inv_freq")]
    shapes = [
        f"{k.name} is {_text(sources[k.name].shape)}, not {_text(k.shape)}"
        for k in wanted
        if k.name in sources and sources[k.name].shape != k.shape
    ]
    problems = []
    for what, found in (("missing", missing), ("unknown", extra), ("misshapen", shapes)):
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            problems.append(f"{len(found)} {what}: {', '.join(found[:3])}{more}")
    if problems:
        raise UserError(f"{folder}: tensors do not fit its config.json; {'; '.join(problems)}")


def _dtypes(wanted: list[Link], sources: dict[str, Source]) -> dict[str, np.dtype]:
    """Of each leaf of ours: as the tensors it is made of; float32 where they differ."""
    found: dict[str, set[np.dtype]] = {}
    for link in wanted:
        # The cells of an array without memory tell which leaves a link fills.
        blank = np.broadcast_to(np.float32(0), link.shape)
        for leaf, _, _ in link.cells(blank):
            found.setdefault(leaf, set()).add(sources[link.name].dtype)
    kept = set(DTYPES.values())
    return {
        leaf: next(iter(types)) if len(types) == 1 and types <= kept else DTYPES["float32"]
        for leaf, types in found.items()
    }


def _bring(link: Link, source: Source, store: Store, folder: Path) -> None:
    if not link.copy:
        for start, stop in _pieces(link):
            value = source.read(start, stop) if link.by_rows else source.read()
            for leaf, index, view in link.cells(value):
                store.write(leaf, index, view, start)
        return
    for leaf, index, view in link.cells(source.read()):
        if not np.array_equal(store.read(leaf, index), view):
            raise UserError(
                f"{folder}: {link.name} should repeat {leaf} of the main model, and differs from it"
            )


# Out


def _stored(link: Link, params: Params) -> np.dtype:
    blank = np.broadcast_to(np.float32(0), link.shape)
    types = {params.array(leaf).dtype.numpy_dtype for leaf, _, _ in link.cells(blank)}
    return types.pop() if len(types) == 1 else DTYPES["float32"]


def _gathered(link: Link, dtype: np.dtype, params: Params) -> Iterator[np.ndarray]:
    """The tensor, in pieces along its first dim."""
    for first, last in _pieces(link):
        value = np.empty((last - first, *link.shape[1:]), dtype)
        for leaf, index, view in link.cells(value):
            # By rows of ours, so that little is held twice.
            array = params.array(leaf)[index]
            rows = max(1, SLAB // max(1, view[:1].size))
            for start in range(0, len(view), rows):
                stop = min(start + rows, len(view))
                with reading(f"{params.where}: parameter {leaf}"):
                    values = array[first + start : first + stop].read().result()
                copy_to(view[start:stop], values)
        yield value


def _write_tokenizer(params: Params, to: Path, hf: dict[str, Any]) -> None:
    """The files that came along; or those of a run's own BPE, as transformers wants them."""
    source = params.tokenizer
    if source is None:
        return
    if source.is_dir():
        _carry(source, to)
        return
    with reading(source):
        _write_own_tokenizer(source, params.seq_len, to, hf)


def _write_own_tokenizer(source: Path, seq_len: int | None, to: Path, hf: dict[str, Any]) -> None:
    tokenizer = json_object(source)
    if tokenizer.get("kind") == "bytes":  # transformers has no such tokenizer
        return
    if tokenizer.get("kind") == "sentencepiece":
        (to / "tokenizer.model").write_bytes(base64.b64decode(tokenizer["model"]))
        return
    shutil.copyfile(source, to / "tokenizer.json")
    special = [t for t in tokenizer.get("added_tokens", []) if t.get("special")]
    ends = [t for t in special if t["content"] in SPECIALS["eot"]]
    end = (ends or special or [None])[0]
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": seq_len}
    if end is not None:
        about["eos_token"] = end["content"]
        hf["eos_token_id"] = hf["bos_token_id"] = end["id"]
    (to / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")


# Both


def _pieces(link: Link) -> Iterator[tuple[int, int]]:
    """Rows of their first dim that are held at one time: of what may come by rows, few."""
    n = link.shape[0]
    rows = max(1, SLAB // math.prod(link.shape[1:])) if link.by_rows else n
    for start in range(0, n, rows):
        yield start, min(start + rows, n)


def _begin(to: Path) -> Path:
    """The name that `to` has until it is whole."""
    if to.exists():
        raise UserError(f"--to {to}: it exists already; give another folder or remove it")
    if not to.absolute().parent.is_dir():
        raise UserError(f"--to {to}: there is no folder {to.absolute().parent}")
    part = to.with_name(f"{to.name}.part-{os.getpid()}")
    return part


def _carry(source: Path, to: Path) -> None:
    for name in CARRIED:
        if (source / name).is_file():
            to.mkdir(exist_ok=True)
            shutil.copyfile(source / name, to / name)


def _read_json(file: Path) -> dict[str, Any]:
    return json_object(file, "give a folder as transformers writes it")


def _bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return dtype.itemsize * int(np.prod(shape, dtype=np.int64))


def _text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
