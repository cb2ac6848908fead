"""Text to hold out: a user's file or folder, a tree at a commit, or an installed package."""

import gzip
import hashlib
import io
import re
import subprocess
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxmoe.data import sources
from jaxmoe.data.fetch import inside
from jaxmoe.data.sources import Document, Unreadable
from jaxmoe.errors import UserError
from jaxmoe.outside import loads, reading

__all__ = ["Found", "from_git", "from_packages", "from_path", "read_pins"]

_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson")
# What a record's text is made of, by the fields that it has: infilling sets, HumanEval, plain text.
_FIELDS = (
    ("prompt", "canonical_solution", "suffix"),
    ("prompt", "canonical_solution"),
    ("text",),
    ("content",),
)
_NAMES = ("task_id", "id", "name", "path", "title")
# Its passages stand above half of all code: held out, they would make leaks of it.
_LICENCE = re.compile(r"(?i)(licen[cs]e|copying|notice)([-._].*)?")
_ARTICLE = re.compile(rb"(?m)^ = [^=\n].* = *$")  # wikitext: a title; sections have more signs


@dataclass(frozen=True, kw_only=True)
class Found:
    documents: tuple[Document, ...]
    skipped: dict[str, int]  # reason -> files or records
    origin: dict[str, Any]  # what the manifest says of where it came from


def from_path(
    path: str | Path,
    *,
    fields: Sequence[str] = (),
    domain: str | None = None,
    pins: dict[str, str] | None = None,
) -> Found:
    """Documents of a file or folder: text, wikitext (an article each), records of .jsonl(.gz/.zst).

    Args:
        fields: of a record, joined without anything between them; (): by what it has.
        domain: of all of them; None: by the file's name.
        pins: SHA-256 by path in the folder: exactly these files are read, and must have these sums.

    Raises:
        UserError: no such path, no text in it, a record without the fields, or another sum.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise UserError(f"{path}: no such file or folder; give one with text in it")
    files = _pinned(root, pins) if pins is not None else _files(root)
    documents: list[Document] = []
    skipped: Counter[str] = Counter()
    for name, file in files:
        _add(documents, skipped, name, file.read_bytes(), fields)
    if domain is not None:
        documents = [replace(d, domain=domain) for d in documents]
    origin = {"how": "pinned files" if pins is not None else "path", "from": root.name}
    return _found(documents, skipped, origin, str(path))


def from_git(repository: str | Path, commit: str) -> Found:
    """Every text file of the tree at a commit, whose id vouches for all of it.

    Raises:
        UserError: no git here, no such commit, or no text in it.
    """
    full = _git(repository, "rev-parse", "--verify", f"{commit}^{{commit}}").decode().strip()
    archive = io.BytesIO(_git(repository, "archive", "--format=tar", full))
    documents: list[Document] = []
    skipped: Counter[str] = Counter()
    with tarfile.open(fileobj=archive) as tree:
        for member in tree:
            stream = tree.extractfile(member) if member.isfile() else None
            if stream is not None:
                _add(documents, skipped, member.name, stream.read(), (), records=False)
    return _found(documents, skipped, {"how": "git", "commit": full}, f"{repository} at {commit}")


def from_packages(names: Sequence[str]) -> Found:
    """Packages of this Python installation (jaxmoe/data/sources.py), whole.

    Raises:
        UserError: no package of such a name.
    """
    listing = sources.screen(sources.installed())
    known = sorted({f.package for f in listing.files})
    for name in names:
        if name not in known:
            raise UserError(f"package {name!r} is not of this installation: {', '.join(known)}")
    documents: list[Document] = []
    skipped: Counter[str] = Counter()
    for file in (f for f in listing.files if f.package in names):
        try:
            documents += sources.read(file)
        except Unreadable as error:
            skipped[str(error)] += 1
    origin = {"how": "packages", "packages": sorted(names)}
    return _found(documents, skipped, origin, ", ".join(names))


def read_pins(path: str | Path) -> dict[str, str]:
    """SHA-256 by path, of a file as sha256sum writes it.

    Raises:
        UserError: no such file, or a line of another form.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{path}: no such file; sha256sum writes one")
    pins = {}
    with reading(file):
        text = file.read_text()
    for number, line in enumerate(text.splitlines(), 1):
        found = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        if not found:
            raise UserError(f"{path}: line {number} is not a SHA-256, two spaces and a path")
        name = found[2].removeprefix("./")
        if not inside(name):
            raise UserError(f"{path}: line {number}: {name!r} leads out of the folder")
        pins[name] = found[1]
    return pins


def _files(root: Path) -> Iterator[tuple[str, Path]]:
    if root.is_file():
        yield root.name, root
        return
    for file in sources.folder(str(root)).files:
        yield file.name, file.path


def _pinned(root: Path, pins: dict[str, str]) -> Iterator[tuple[str, Path]]:
    for name, expected in sorted(pins.items()):
        file = root / name
        if not file.is_file():
            raise UserError(f"{file}: pinned, and not there; give the folder that was pinned")
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != expected:
            raise UserError(f"{file}: its SHA-256 is {found}, and {expected} is pinned")
        yield name, file


def _add(
    documents: list[Document],
    skipped: Counter[str],
    name: str,
    data: bytes,
    fields: Sequence[str],
    records: bool = True,
) -> None:
    """A file's documents, or the reason why it has none."""
    if records and name.endswith(_LINES):
        documents += _records(name, data, fields, skipped)
        return
    package = Path(name).parts[0] if len(Path(name).parts) > 1 else Path(name).stem
    domain = sources.domain_of(name)
    reason = "licence" if _LICENCE.fullmatch(Path(name).name) else _fault(data)
    if reason:
        skipped[reason] += 1
        return
    for title, part in _articles(name, data):
        documents.append(Document(package=package, name=title, data=part, domain=domain))


def _fault(data: bytes) -> str | None:
    if not data.strip():
        return "empty"
    if b"\0" in data:
        return "NUL bytes"
    try:
        data.decode()
    except UnicodeDecodeError:
        return "not UTF-8"
    return None


def _articles(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    """The file as one, or its articles where it is wikitext: it begins with a title."""
    titles = list(_ARTICLE.finditer(data))
    if not titles or data[: titles[0].start()].strip():
        yield name, data
        return
    # A title has blank lines around it; what looks like one inside of a table has not.
    cuts = [t.start() for t in titles if not data[: t.start()].rpartition(b"\n")[0][-2:].strip()]
    for begin, end in zip(cuts, [*cuts[1:], len(data)], strict=True):
        title = data[begin:end].split(b"\n", 1)[0].decode().strip(" =")
        yield f"{name}:{begin}:{title}", data[begin:end]


def _records(
    name: str, data: bytes, fields: Sequence[str], skipped: Counter[str]
) -> Iterator[Document]:
    package = name.partition(".jsonl")[0].partition(".ndjson")[0]
    for number, line in enumerate(_unpacked(name, data).splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            skipped["not a JSON object"] += 1
            continue
        text = _text(record, fields, f"{name}: line {number}")
        if not text.strip():
            skipped["empty"] += 1
            continue
        title = next((str(record[k]) for k in _NAMES if k in record), str(number))
        domain = "code" if "canonical_solution" in record else "prose"
        yield Document(
            package=package,
            name=f"{name}:{title}",
            data=text.encode("utf-8", "replace"),  # JSON can spell half of a surrogate pair
            domain=domain,
        )


def _text(record: dict[str, Any], fields: Sequence[str], where: str) -> str:
    wanted = tuple(fields) or next((f for f in _FIELDS if all(k in record for k in f)), ())
    if not wanted or not all(isinstance(record.get(k), str) for k in wanted):
        asked = " and ".join(wanted) or "text"
        raise UserError(
            f"{where} has no text in {asked}; name its fields with --field: {', '.join(record)}"
        )
    return "".join(record[k] for k in wanted)


def _unpacked(name: str, data: bytes) -> bytes:
    if name.endswith(".gz"):
        with reading(name, "give the whole file"):
            try:
                return gzip.decompress(data)
            except (EOFError, zlib.error) as error:
                raise ValueError(f"damaged: {error}") from None
    if name.endswith(".zst"):
        try:
            import zstandard
        except ImportError:
            raise UserError(f"{name}: needs zstandard: pip install zstandard") from None
        try:
            return zstandard.ZstdDecompressor().decompressobj().decompress(data)
        except zstandard.ZstdError as error:
            raise UserError(f"{name}: damaged: {error}; give the whole file") from None
    return data


def _git(repository: str | Path, *command: str) -> bytes:
    try:
        done = subprocess.run(["git", "-C", str(repository), *command], capture_output=True)
    except FileNotFoundError:
        raise UserError("git is not installed; give the files with --from and --pins") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["failed"]
        raise UserError(f"git {' '.join(command)} in {repository}: {said[-1]}")
    return done.stdout


def _found(
    documents: Sequence[Document], skipped: Counter[str], origin: dict[str, Any], where: str
) -> Found:
    if not documents:
        why = ", ".join(f"{n} {reason}" for reason, n in skipped.items()) or "it is empty"
        raise UserError(f"{where}: no text to hold out ({why})")
    return Found(documents=tuple(documents), skipped=dict(sorted(skipped.items())), origin=origin)
