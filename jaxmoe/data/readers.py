"""Documents out of pieces. What cannot be read is said, with a reason, and never fatal here."""

import functools
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmoe.data import fetch, sources
from jaxmoe.data.extract import EXTRACT, MIN_PROSE, Malformed, decode, inflate, split_python
from jaxmoe.data.pieces import Piece
from jaxmoe.errors import UserError
from jaxmoe.outside import loads

__all__ = ["Fault", "Text", "read_piece", "record_count", "row_groups", "unpack"]

MAX_DOCUMENT = 1 << 28  # bytes; a longer line or file is no document
_SCREENED_BYTES = 200, 1_000_000  # of a package's file, as in sources.installed
_CHUNK = 1 << 20
_CODE = frozenset((".go", ".rs", ".c", ".h"))  # whose comments begin so:
_GENERATED = re.compile(rb"(?im)^//.*(code generated|do not edit|@generated)")


@dataclass(frozen=True, kw_only=True)
class Text:
    """A document."""

    source: str
    package: str
    name: str
    data: bytes  # valid UTF-8


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A record without a document."""

    source: str
    name: str
    reason: str
    malformed: bool  # not what it should be; else left out on purpose


def read_piece(piece: Piece) -> Iterator[Text | Fault]:
    """Every record of a piece, in the order of the file."""
    reader = {"lines": _lines, "parquet": _parquet, "records": _records}.get(piece.kind, _file)
    try:
        yield from reader(piece)
    except Malformed as error:
        yield _fault(piece, piece.name, str(error))
    except OSError as error:
        yield _fault(piece, piece.name, f"unreadable: {error.strerror or type(error).__name__}")


def row_groups(piece: Piece) -> list[int]:
    """Bytes of each group of rows; [] if the file cannot be read."""
    pq = _arrow()
    try:
        about = pq.ParquetFile(piece.path).metadata
    except Exception:  # pyarrow's own kinds; the piece's reader says what is wrong
        return []
    return [about.row_group(i).total_byte_size for i in range(about.num_row_groups)]


def record_count(piece: Piece) -> int:
    """0 if the file cannot be read: its index is at its end."""
    return _array_record(piece).num_records()


def unpack(path: Path, to: Path) -> str | None:
    """Writes the plain file of a .gz or .zst; what could be had of a cut one, and why it is cut."""
    fault: str | None = None
    with open(path, "rb") as packed, open(to, "wb") as plain:
        try:
            for part in _zst(packed) if path.suffix == ".zst" else _gz(packed):
                plain.write(part)
        except Malformed as error:
            fault = str(error)
    return fault


def _file(piece: Piece) -> Iterator[Text | Fault]:
    data = _bytes(piece)
    if len(data) > MAX_DOCUMENT:
        raise Malformed("too large")
    if piece.path.endswith(".zst") and piece.kind == "text":
        data = b"".join(_zst_bytes(data))
    elif data[:2] == b"\x1f\x8b" and piece.extract != "raw":
        data = inflate(data, MAX_DOCUMENT)
    if piece.screen:
        reason = _screened(piece, data)
        if reason:
            yield _fault(piece, piece.name, reason, malformed=False)
            return
    elif b"\0" in data[:_CHUNK] and piece.extract == "text":
        yield _fault(piece, piece.name, "binary", malformed=False)
        return
    if piece.extract == "python":
        yield from _python(piece, decode(data))
        return
    for part, text in EXTRACT[piece.extract](data):
        if text.strip():
            yield Text(
                source=piece.source,
                package=piece.package,
                name=piece.name + part,
                data=text.encode(),
            )


def _python(piece: Piece, text: str) -> Iterator[Text]:
    code, prose = split_python(text)
    if not code and not prose:  # another Python's syntax
        code = text
    for source, part in ((piece.source, code), (piece.split, prose)):
        data = part.encode()
        if len(data) >= (MIN_PROSE if source == piece.split or piece.screen else 1):
            yield Text(source=source, package=piece.package, name=piece.name, data=data)


def _screened(piece: Piece, data: bytes) -> str | None:
    least, most = _SCREENED_BYTES
    if len(data) < least:
        return f"under {least} bytes"
    if piece.extract in ("python", "text") and len(data) > most:
        return f"over {most} bytes"
    if Path(piece.name).suffix in _CODE and _GENERATED.search(data[:1_500]):
        return "generated"
    code = piece.extract == "python" or Path(piece.name).suffix in _CODE
    return sources.fault(data, "python" if code else "text", whole=True)


def _bytes(piece: Piece) -> bytes:
    if piece.kind != "member":
        return Path(piece.path).read_bytes()
    if piece.path.endswith(".tar"):
        with open(piece.path, "rb") as stream:
            stream.seek(piece.start)
            # Its header may claim more than there is: so much would be set aside before it is read.
            return stream.read(min(piece.stop - piece.start, MAX_DOCUMENT + 1))
    try:
        return fetch.read_member(_archive(piece.path), piece.name, MAX_DOCUMENT)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError, ValueError):
        raise Malformed("damaged archive member") from None


@functools.lru_cache(maxsize=32)
def _archive(path: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def _lines(piece: Piece) -> Iterator[Text | Fault]:
    """The lines that begin in [start, stop)."""
    with open(piece.path, "rb") as stream:
        if piece.start:
            stream.seek(piece.start - 1)
            _rest_of_line(stream)
        while (at := stream.tell()) < piece.stop:
            line = stream.readline(MAX_DOCUMENT)
            name = f"{piece.name}:{at}"
            if len(line) == MAX_DOCUMENT and line[-1:] != b"\n":
                _rest_of_line(stream)
                yield _fault(piece, name, "too large")
            elif line.strip():
                yield _line(piece, name, line)


def _line(piece: Piece, name: str, line: bytes) -> Text | Fault:
    try:
        row = loads(line)
    except (ValueError, RecursionError):
        return _fault(piece, name, "not JSON")
    if not isinstance(row, dict):
        return _fault(piece, name, "not a JSON object")
    return _row(piece, name, row.get(piece.text), row.get(piece.id))


def _row(piece: Piece, name: str, text: Any, identity: Any) -> Text | Fault:
    if text is None:
        return _fault(piece, name, f"no field {piece.text!r}")
    if not isinstance(text, str):
        return _fault(piece, name, f"field {piece.text!r} is no string")
    if not text.strip():
        return _fault(piece, name, "empty", malformed=False)
    try:
        data = text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, written with \u
        return _fault(piece, name, "not UTF-8")
    if isinstance(identity, str | int):
        name = str(identity)
    return Text(source=piece.source, package=piece.package, name=name, data=data)


def _rest_of_line(stream: Any) -> None:
    while (part := stream.readline(_CHUNK)) and not part.endswith(b"\n"):
        pass


def _parquet(piece: Piece) -> Iterator[Text | Fault]:
    pq = _arrow()
    columns = [piece.text, *([piece.id] if piece.id else [])]
    try:
        file = pq.ParquetFile(piece.path)
        wrong = [c for c in columns if c not in file.schema_arrow.names]
        if wrong:
            names = ", ".join(file.schema_arrow.names[:8])
            raise UserError(f"{piece.path}: no column {wrong[0]!r}; text=NAME, one of {names}")
        table = file.read_row_group(piece.start, columns=columns)
        rows = zip(*(table.column(c).to_pylist() for c in columns), strict=True)
    except UserError:
        raise
    except Exception as error:  # pyarrow's own kinds, and OSError for a cut file
        raise Malformed(f"parquet: {str(error).splitlines()[0][:80]}") from None
    for number, row in enumerate(rows):
        name = f"{piece.name}:{piece.start}:{number}"
        yield _row(piece, name, row[0], row[1] if piece.id else None)


def _records(piece: Piece) -> Iterator[Text | Fault]:
    """ArrayRecord: a record is UTF-8 text, or a JSON object if a field other than text is set."""
    reader = _array_record(piece)
    if not reader.ok() or piece.stop < 0:  # an empty one has no index, so no range either
        raise Malformed("damaged or empty ArrayRecord")
    try:
        found: list[bytes | None] = reader.read(piece.start, piece.stop)
    except (RuntimeError, IndexError):  # a chunk is damaged; the others are whole
        found = [_one_record(piece, i) for i in range(piece.start, piece.stop)]
    for number, record in enumerate(found, piece.start):
        name = f"{piece.name}:{number}"
        if record is None:
            yield _fault(piece, name, "damaged record")
        elif piece.text != "text":
            yield _line(piece, name, record)
        else:
            try:
                yield _row(piece, name, decode(record), None)
            except Malformed as error:
                yield _fault(piece, name, str(error))


def _one_record(piece: Piece, number: int) -> bytes | None:
    try:
        return _array_record(piece).read([number])[0]  # a reader is of no use after an error
    except (RuntimeError, IndexError):
        return None


def _fault(piece: Piece, name: str, reason: str, *, malformed: bool = True) -> Fault:
    return Fault(source=piece.source, name=name, reason=reason, malformed=malformed)


def _gz(stream: Any) -> Iterator[bytes]:
    """Of one member or several; raises Malformed where it ends too early."""
    unzip = zlib.decompressobj(wbits=31)
    data = stream.read(_CHUNK)
    try:
        while data:
            yield unzip.decompress(data)
            data = unzip.unused_data
            if unzip.eof and (data := data or stream.read(_CHUNK)):
                unzip = zlib.decompressobj(wbits=31)
            elif not unzip.eof:
                data = stream.read(_CHUNK)
    except zlib.error:
        raise Malformed("damaged gzip") from None
    if not unzip.eof:
        raise Malformed("cut off")


def _zst(stream: Any) -> Iterator[bytes]:
    return _zst_parts(iter(lambda: stream.read(_CHUNK), b""))


def _zst_bytes(data: bytes) -> Iterator[bytes]:
    return _zst_parts(iter([data]))


def _zst_parts(parts: Iterator[bytes]) -> Iterator[bytes]:
    zstandard = _zstandard()
    frames = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = None
    try:
        for part in parts:
            while part:
                frame = frame or frames.decompressobj()
                yield frame.decompress(part)
                part = b""
                if frame.eof:
                    part, frame = frame.unused_data, None
    except zstandard.ZstdError:
        raise Malformed("damaged zstd") from None
    if frame is not None:
        raise Malformed("cut off")


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f".zst needs zstandard ({error}): pip install 'jaxmoe[data]'") from None
    return zstandard


def _arrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"parquet needs pyarrow ({error}): pip install 'jaxmoe[data]'") from None
    return pyarrow.parquet


def _array_record(piece: Piece) -> Any:
    try:
        from array_record.python.array_record_module import ArrayRecordReader
    except ImportError as error:
        raise UserError(f"ArrayRecord needs array_record ({error}): pip install grain") from None
    return ArrayRecordReader(piece.path)
