"""Text out of files: markup off, and docstrings and comments of Python apart from its code.

Each function takes a file's bytes and gives [(part of the name, text)], or raises `Malformed`.
"""

import ast
import html.parser
import inspect
import itertools
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxmoe.outside import loads

__all__ = ["EXTRACT", "Malformed", "decode", "inflate", "split_python"]

MIN_PROSE = 200  # bytes of a file's docstrings and comments together
_MIN_COMMENT = 40  # characters of a block of comments; shorter ones are labels
# Strings before comments, or the # in a string would begin one; the prefixes do not matter, for a
# backslash keeps a quote from ending also a raw string.
_TOKEN = re.compile(
    r'(?s)"""(?:[^"\\]|\\.|"(?!""))*"""'
    r"|'''(?:[^'\\]|\\.|'(?!''))*'''"
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'(?:[^'\\\n]|\\.)*'"
    r"|(?P<comment>\#[^\n]*)"
)
_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
# Comments that say nothing of the code: licences, and orders to tools.
_LEGAL = re.compile(r"(?i)copyright|SPDX-|licen[cs]e|all rights reserved")
_ORDER = re.compile(r"(?i)(pylint|noqa|type|mypy|fmt|isort|ruff|pragma|yapf|flake8|-\*-)\b[ :-]")
_ENTRY = re.compile(r"\n\n(?=\S)")
_DICTIONARY_PART = 16_000  # characters
_SEMICOLON = re.compile(r"[ \t]*;[ \t]*")
_JOINED = ("\\\n", "\\\r\n")
_BLANK = re.compile(r"[ \t]+(?=\n)|(?<=\n\n)\n+")
_SPACE = re.compile(r"[ \t\n]+")


class Malformed(Exception):
    """Why no text can be had; the reason is counted, with an example."""


def decode(data: bytes) -> str:
    """Raises Malformed unless `data` is UTF-8 without NUL."""
    if b"\0" in data:
        raise Malformed("NUL bytes")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise Malformed("not UTF-8") from None


def inflate(data: bytes, limit: int) -> bytes:
    """Of gzip, also of several members. Raises Malformed: cut off, damaged or over `limit`."""
    out: list[bytes] = []
    room = limit + 1
    try:
        while data:
            stream = zlib.decompressobj(wbits=31)
            out.append(stream.decompress(data, room))
            room -= len(out[-1])
            if room <= 0:
                raise Malformed("too large when decompressed")
            if not stream.eof:
                raise Malformed("cut off")
            data = stream.unused_data
    except zlib.error:
        raise Malformed("damaged gzip") from None
    return b"".join(out)


def split_python(text: str) -> tuple[str, str]:
    """(the code without docstrings and comments, these as text); ("", "") if it does not parse.

    The code means what it meant: a body of a docstring alone becomes `...`.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "", ""
    lines = _line_starts(text)
    cuts: list[tuple[int, int, str]] = []
    prose: list[tuple[int, str]] = []
    for name, node, alone in _docstrings(tree):
        start = _offset(text, lines, node.lineno, node.col_offset)
        stop = _offset(text, lines, node.end_lineno or 0, node.end_col_offset or 0)
        instead = "..." if alone or _continues(text, start) else ""
        after = _SEMICOLON.match(text, stop)
        cuts.append((start, after.end() if after and not instead else stop, instead))
        shown = _clean(str(ast.literal_eval(node)))
        prose.append((start, f"{name}: {shown}" if name else shown))
    cuts += _comments(text, prose)
    return _cut(text, sorted(cuts)), "\n\n".join(t for _, t in sorted(prose)) + "\n"


def _docstrings(tree: ast.Module) -> Iterator[tuple[str, ast.expr, bool]]:
    """(name of what it describes, the string, whether it is the whole body)."""
    stack: list[Any] = [tree]
    while stack:  # only through statements: expressions are most of a tree, and hold none
        node = stack.pop()
        for field in ("body", "orelse", "finalbody", "handlers", "cases"):
            stack += getattr(node, field, ())
        if not isinstance(node, _DOCUMENTED):
            continue
        name = "" if isinstance(node, ast.Module) else node.name
        leading = itertools.takewhile(_is_string, node.body)  # the next would become it
        strings = [s for s in leading if isinstance(s, ast.Expr)]
        alone = len(strings) == len(node.body) and not isinstance(node, ast.Module)
        for number, statement in enumerate(strings):
            yield name, statement.value, alone and not number


def _is_string(node: ast.stmt) -> bool:
    constant = node.value if isinstance(node, ast.Expr) else None
    return isinstance(constant, ast.Constant) and isinstance(constant.value, str)


def _comments(text: str, prose: list[tuple[int, str]]) -> list[tuple[int, int, str]]:
    """Where comments are; blocks of them are put into `prose` if they say something."""
    cuts: list[tuple[int, int, str]] = []
    block: list[str] = []
    start = last = -1
    for match in _TOKEN.finditer(text):
        if match["comment"] is None:
            continue
        at = match.start()
        if _continues(text, at):  # without it, the next line would belong to the one before
            continue
        cuts.append((at, match.end(), ""))
        if last < 0 or text[last:at].strip() or text.count("\n", last, at) > 1:
            _end_block(start, block, prose)
            block, start = [], at
        said = match["comment"].lstrip("#!: ").rstrip()
        if not _ORDER.match(said):
            block.append(said)
        last = match.end()
    _end_block(start, block, prose)
    return cuts


def _end_block(start: int, block: list[str], prose: list[tuple[int, str]]) -> None:
    said = "\n".join(block).strip()
    if len(said) >= _MIN_COMMENT and not _LEGAL.search(said):
        prose.append((start, said))


def _continues(text: str, at: int) -> bool:
    """Whether only a backslash and a line end stand before."""
    line = text.rfind("\n", 0, at) + 1
    return not text[line:at].strip(" \t") and text[max(0, line - 3) : line].endswith(_JOINED)


def _cut(text: str, cuts: list[tuple[int, int, str]]) -> str:
    """`text` without the cuts, without the lines that they leave empty."""
    out: list[str] = []
    at = 0
    for start, stop, instead in cuts:
        line = text.rfind("\n", 0, start) + 1
        end = text.find("\n", stop)
        end = len(text) if end < 0 else end
        before, after = text[line:start].strip(), text[stop:end].strip("; \t\r")
        if not (instead or before or after):
            out.append(text[at:line])
            at = min(end + 1, len(text))
            continue
        trailing = before and not after and not instead
        out += [text[at:start].rstrip(" \t") if trailing else text[at:start], instead]
        at = stop
    return "".join([*out, text[at:]])


def _line_starts(text: str) -> list[int]:
    return [0, *(m.end() for m in re.finditer(r"\r\n|\r|\n", text))]


def _offset(text: str, lines: list[int], line: int, column: int) -> int:
    """Of a position whose column is in bytes of UTF-8."""
    start = lines[line - 1]
    head = text[start : start + column]
    if head.isascii():
        return start + column
    return start + len(head.encode()[:column].decode(errors="ignore"))


def _clean(text: str) -> str:
    """A docstring without the indentation of its lines."""
    return inspect.cleandoc(text).strip()


class _Text(html.parser.HTMLParser):
    _BLOCKS = frozenset(
        "p br div li tr h1 h2 h3 h4 h5 h6 pre dt dd table ul ol dl blockquote".split()
    )
    _SILENT = frozenset(("script", "style", "head", "nav"))

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._silent = self._exact = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._silent += tag in self._SILENT
        self._exact += tag == "pre"
        if tag in self._BLOCKS:
            self.parts.append("\n\n" if tag in ("p", "pre") or tag[0] == "h" else "\n")

    def handle_endtag(self, tag: str) -> None:
        self._silent = max(0, self._silent - (tag in self._SILENT))
        self._exact = max(0, self._exact - (tag == "pre"))
        if tag in self._BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if self._silent:
            return
        if not self._exact:
            data = _SPACE.sub(" ", data)
            if not self.parts or self.parts[-1].endswith(("\n", " ")):
                data = data.lstrip(" ")
        self.parts.append(data)


def strip_html(text: str) -> str:
    """What a reader sees, paragraphs apart."""
    parser = _Text()
    parser.feed(text)
    parser.close()
    return _BLANK.sub("", "".join(parser.parts)).strip() + "\n"


def _service(data: bytes) -> list[tuple[str, str]]:
    """The documentation strings of an AWS service description, tags off, each once."""
    tree = _json(data)
    seen: dict[str, None] = {}
    about = tree.get("metadata", {}).get("serviceFullName", "")
    heads = [(about, tree)]
    for kind in ("operations", "shapes"):
        for name, node in sorted(tree.get(kind, {}).items()):
            heads.append((name, node))
            heads += sorted((node.get("members") or {}).items())
    for name, node in heads:
        said = node.get("documentation") if isinstance(node, Mapping) else None
        if said and len(said) > 60:
            seen[f"{name}: {strip_html(said).strip()}"] = None
    return [("", "\n\n".join(seen) + "\n")]


def _leads(data: bytes) -> list[tuple[str, str]]:
    """Lead sections of an encyclopedia: {key: {"title", "extract"}}."""
    rows = [(key, row) for key, row in sorted(_json(data).items()) if row.get("extract")]
    return [(f":{key}", f"{row['title']}\n\n{row['extract']}\n") for key, row in rows]


def _recipes(data: bytes) -> list[tuple[str, str]]:
    found = []
    for key, row in sorted(_json(data).items()):
        needs, steps = "\n".join(row["ingredients"] or []), "\n".join(row["steps"] or [])
        found.append((f":{key}", f"{row['title']}\n\n{needs}\n\n{steps}\n"))
    return found


def _literals(data: bytes) -> list[tuple[str, str]]:
    """The long string literals of a Python file: some packages carry a book so."""
    nodes = ast.walk(ast.parse(decode(data)))
    texts = [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return [(f":{i}", t.strip() + "\n") for i, t in enumerate(t for t in texts if len(t) > 100_000)]


def _topics(data: bytes) -> list[tuple[str, str]]:
    """pydoc's language reference: one dict of strings."""
    tables = [n.value for n in ast.parse(decode(data)).body if isinstance(n, ast.Assign)]
    rows = ast.literal_eval(tables[0]) if tables else {}
    return [(f":{key}", text) for key, text in sorted(rows.items()) if len(text) >= MIN_PROSE]


def _dictionary(data: bytes) -> list[tuple[str, str]]:
    """A dictd file in parts of whole entries, which begin at the left edge after a blank line."""
    text = data.decode(errors="replace")  # 3 bytes of gcide's 40 MB are of Windows-1252
    parts: list[tuple[str, str]] = []
    start = 0
    while start < len(text):
        edge = _ENTRY.search(text, min(start + _DICTIONARY_PART, len(text)))
        stop = edge.start() + 1 if edge else len(text)
        parts.append((f":{start}", text[start:stop].strip() + "\n"))
        start = stop
    return parts


def _json(data: bytes) -> dict[str, Any]:
    try:
        tree = loads(data)
    except ValueError:
        raise Malformed("not JSON") from None
    if not isinstance(tree, dict):
        raise Malformed("not a JSON object")
    return tree


EXTRACT: Mapping[str, Callable[[bytes], list[tuple[str, str]]]] = {
    "text": lambda data: [("", decode(data))],
    "html": lambda data: [("", strip_html(decode(data)))],
    "service": _service,
    "leads": _leads,
    "recipes": _recipes,
    "literals": _literals,
    "topics": _topics,
    "dictionary": _dictionary,
}
