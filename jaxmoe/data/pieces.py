"""What a data set is built from: sources by name, listed as pieces that are read on their own.

A piece is a file, a member of an archive, a range of a file of lines, a group of rows of a parquet
file or a range of records. Files are taken in the order of the hash of their names, so that the
first part of a source is a fair sample of it; records of one file stay in their order.
"""

import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxmoe.data.dataset import check_name
from jaxmoe.errors import UserError

__all__ = [
    "Input",
    "Kind",
    "Listed",
    "Piece",
    "kind_of",
    "list_input",
    "order",
    "packed",
    "parse_source",
]

Kind = Literal["text", "lines", "parquet", "records", "member"]
_OPTIONS = ("kind", "text", "id", "domain", "licence", "split")
_SPLIT = re.compile(rf",(?=(?:{'|'.join(_OPTIONS)})=)")
_KINDS: dict[str, Kind] = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".parquet": "parquet",
    ".array_record": "records",
    ".arrayrecord": "records",
}
_PACKED = (".gz", ".zst")
_CODE = frozenset(
    ".py .pyi .c .h .cc .cpp .hpp .cu .rs .go .java .js .ts .tsx .jsx .rb .sh .lua .scala .kt "
    ".swift .cs .php .pl .r .jl .hs .ml .sql .toml .yaml .yml .json .xml .html .css".split()
)
_NEVER = frozenset((".pyc", ".so", ".png", ".jpg", ".zip", ".whl", ".tar", ".pdf"))


@dataclass(frozen=True, kw_only=True)
class Input:
    """One --source: where its files are, and how text is had from them."""

    name: str
    where: str  # a folder, a file, or a pattern with *, ** and ?
    kind: Kind | None = None  # of all its files; None: by each file's suffix
    text: str = "text"  # the field or column of the text, in lines and parquet
    id: str = ""  # the field of the document's name; "": the place in the file
    domain: str = ""  # code, prose, ...; "": by what most of its bytes look like
    licence: str = ""
    split: str = ""  # the source that Python's docstrings and comments go to


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of the input; documents come out of it in one order, whoever reads it."""

    source: str
    kind: Kind
    path: str  # of the file or archive
    name: str  # of the document, or of the file that documents are in
    package: str
    size: int  # bytes to read; of what is compressed, on the disk
    stamp: str = ""  # changes when the file does
    start: int = 0  # byte, row group or record; of a member of a tar, where its bytes are
    stop: int = -1
    extract: str = "text"
    split: str = ""
    text: str = "text"
    id: str = ""
    screen: bool = False  # leave out what is generated, tiny or a table (jaxmoe/data/sources.py)


@dataclass(kw_only=True)
class Listed:
    """The pieces of one or more sources, and what the manifest says of each source."""

    pieces: list[Piece] = field(default_factory=list)
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    dropped: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, other: "Listed") -> None:
        """Raises UserError when both have a source of one name."""
        for name in other.sources:
            if name in self.sources:
                raise UserError(f"source {name} is given twice: give each its own name")
        self.pieces += other.pieces
        self.sources |= other.sources
        self.dropped |= other.dropped


def parse_source(text: str) -> Input:
    """NAME=WHERE[,option=value ...], with the options of `Input`.

    Raises:
        UserError: it has no name or an option that there is not.
    """
    name, equals, rest = text.partition("=")
    if not equals or not rest:
        raise UserError(f"--source {text}: write NAME=WHERE, such as code=src/**/*.py")
    check_name(name)
    where, *options = _SPLIT.split(rest)
    wrong = re.search(r",(\w+)=", where)
    if wrong and not glob.glob(os.path.expanduser(where)):
        raise UserError(f"--source {text}: no option {wrong[1]}; there are {', '.join(_OPTIONS)}")
    given: dict[str, Any] = dict(option.split("=", 1) for option in options)
    if given.get("kind", "text") not in (*_KINDS.values(), "text"):
        raise UserError(f"--source {text}: kind is text, lines, parquet or records")
    if "split" in given:
        check_name(given["split"])
    return Input(name=name, where=where, **given)


def list_input(given: Input) -> Listed:
    """Every file of it that is not hidden and not a link out of its folder.

    Raises:
        UserError: there is none.
    """
    root, paths = _paths(given.where)
    dropped: Counter[str] = Counter()
    files: list[Piece] = []
    code = total = 0
    for path in paths:
        reason = _refused(path, root)
        if reason:
            dropped[reason] += 1
            continue
        stat = path.stat()
        relative = path.relative_to(root)
        files.append(
            Piece(
                source=given.name,
                kind=given.kind or kind_of(path),
                path=str(path),
                name=relative.as_posix(),
                package=relative.parts[0] if len(relative.parts) > 1 else relative.stem,
                size=stat.st_size,
                stamp=str(stat.st_mtime_ns),
                extract="python" if given.split and path.suffix == ".py" else "text",
                split=given.split,
                text=given.text,
                id=given.id,
            )
        )
        total += stat.st_size
        code += stat.st_size * (_bare(path).suffix.lower() in _CODE)
    if not files:
        why = ", ".join(f"{n} {r}" for r, n in dropped.items()) or "nothing is there"
        raise UserError(f"--source {given.name}={given.where}: no file ({why})")
    domain = given.domain or ("code" if 2 * code > total else "prose")
    about = {"domain": domain, "where": given.where, "licence": given.licence}
    listed = Listed(
        pieces=sorted(files, key=lambda p: order(p.name)),
        sources={given.name: about},
        dropped={given.name: dropped},
    )
    if given.split:
        listed.sources[given.split] = {**about, "domain": "prose"}
        listed.dropped[given.split] = Counter()
    return listed


def kind_of(path: Path) -> Kind:
    return _KINDS.get(_bare(path).suffix.lower(), "text")


def packed(piece: Piece) -> bool:
    """Whether its lines must be unpacked before they can be read in parts."""
    return piece.kind == "lines" and piece.path.endswith(_PACKED)


def order(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()


def _bare(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in _PACKED else path


def _paths(where: str) -> tuple[Path, list[Path]]:
    """(the folder that names are relative to, files; in no order)."""
    path = Path(where).expanduser()
    if path.is_dir():
        root = path.resolve()
        return root, [
            Path(here, name) for here, folders, names in _walk(root) for name in names if folders
        ]
    if path.is_file():
        path = path.resolve()
        return path.parent, [path]
    if not glob.has_magic(where):
        raise UserError(f"--source {where}: no such file or folder")
    fixed = list(path.parts[: next(i for i, p in enumerate(path.parts) if glob.has_magic(p))])
    root = Path(*fixed).resolve() if fixed else Path.cwd()
    rest = os.path.join(*path.parts[len(fixed) :])
    found = glob.glob(rest, root_dir=root, recursive=True)
    return root, [root / f for f in found if not (root / f).is_dir()]


def _walk(root: Path) -> Iterator[tuple[str, bool, list[str]]]:
    for here, folders, names in os.walk(root):
        folders[:] = [f for f in folders if not f.startswith(".")]
        yield here, True, names


def _refused(path: Path, root: Path) -> str | None:
    if path.name.startswith("."):
        return "hidden"
    if path.is_symlink() and not path.resolve().is_relative_to(root):
        return "link out of the folder"
    if not path.is_file():
        return "not a file"
    if path.suffix.lower() in _NEVER:
        return "not text by its name"
    return "empty" if path.stat().st_size == 0 else None
