"""What tests of data sets share."""

import dataclasses
from pathlib import Path
from typing import Any

from jaxmoe.data.builder import Plan, build
from jaxmoe.data.dataset import DataSet
from jaxmoe.data.pieces import parse_source
from jaxmoe.data.tokenizer import bytes_tokenizer

BYTES = bytes_tokenizer()


def build_from(tmp_path: Path, *sources: str, out: str = "out", **more: Any) -> DataSet:
    names = {f.name for f in dataclasses.fields(Plan)}
    plan = Plan(
        inputs=tuple(map(parse_source, sources)), **{k: v for k, v in more.items() if k in names}
    )
    rest: dict[str, Any] = {"workers": 1} | {k: v for k, v in more.items() if k not in names}
    return build(plan, BYTES, tmp_path / out, tmp_path / "packages", **rest)


def texts_of(data: DataSet, source: str) -> dict[str, str]:
    stored, found = data.sources[source], {}
    for i in range(stored.documents):
        start, stop = stored.bounds(i)
        name = data.names[source][i]
        found[name.name] = data.tokenizer.decode(stored.read(start, stop - 1))
        assert name.bytes == len(found[name.name].encode())
    assert len(found) == stored.documents
    return found
