"""Not a test: files that are bent in every way, and what a command may then do.

Strategies give changes of a file's bytes; `asked` runs a command and requires that it ends well or
with one line for a person.
"""

import copy
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from jaxmoe.errors import UserError

Change = Callable[[bytes], bytes | None]  # None: a directory lies there instead

DEEP = 100_000
BAR = re.compile(r"% +[\d:-]+$")  # of rich, on standard error
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 7, 2**31, 2**63, -(2**63), 10**400, 1.5, -0.0, 1e308),
    *(float("nan"), float("inf"), float("-inf"), "", "a", "NaN", "\ud800", "\0", "a\nb", "x" * 300),
    *("../../x", "/tmp/x", "..", ".", "a/b", "C:\\x", "~", "$HOME", "<script>", "\x1b[2J"),
    *([], {}, [[]], [1], [None], ["a"], {"a": 1}, {"": {}}, [[1, 2], [3]], [1, "a", None]),
)


def examples(number: int) -> Any:
    """The same examples in every run of the suite."""
    health = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(
        derandomize=True, max_examples=number, deadline=None, suppress_health_check=health
    )


def raw() -> st.SearchStrategy[Change]:
    """Bytes of any file: cut, flipped, put in, or another file altogether."""
    place = st.floats(0, 1, exclude_max=True)
    return st.one_of(
        st.builds(lambda at: lambda data: data[: int(at * len(data))], place),
        st.builds(_flipped, place, st.integers(0, 7)),
        st.builds(_put_in, place, st.sampled_from([b"\0", b"\xff\xfe", b"\n", b"}", b"9" * 5000])),
        st.sampled_from(WHOLE).map(lambda data: lambda _: data),
    )


WHOLE = (
    *(None, b"", b"\n", b"\xff\xfe\xfa" * 40, b"null", b"3", b"[]", b"{}\n", b'"a"\n', b"[1]\n"),
    *(b"NaN\n", b"[" * DEEP + b"\n", b'{"a":' * DEEP + b"\n", b"\x80\x04\x95N." * 9, b"PK\3\4"),
)


def _flipped(at: float, bit: int) -> Change:
    def change(data: bytes) -> bytes:
        place = int(at * len(data))
        return (
            data[:place]
            + bytes(b ^ (1 << bit) for b in data[place : place + 1])
            + data[place + 1 :]
        )

    return change


def _put_in(at: float, what: bytes) -> Change:
    return lambda data: data[: int(at * len(data))] + what + data[int(at * len(data)) :]


def of_json() -> st.SearchStrategy[Change]:
    """A JSON file with a value replaced, left out, or of another name."""
    return st.builds(_bent_tree, st.integers(0, 10**6), _how())


def of_lines() -> st.SearchStrategy[Change]:
    """A file of JSON lines: one line bent as a tree, left out, there twice, moved or spoilt."""
    line = st.integers(0, 10**6)
    bent = st.builds(_bent_line, line, st.integers(0, 10**6), _how())
    moved = st.builds(
        _moved_line, line, st.sampled_from(["out", "twice", "last", "spoilt", "deep"])
    )
    return st.one_of(bent, bent, bent, moved)


def _how() -> st.SearchStrategy[tuple[str, Any]]:
    put = st.tuples(st.just("put"), st.sampled_from(VALUES))
    return st.one_of(put, put, put, st.sampled_from([("drop", None), ("rename", None)]))


def bent_tree(tree: Any, which: int, how: tuple[str, Any]) -> Any:
    """A copy with one of its places changed; the top is one."""
    tree = copy.deepcopy(tree)
    places = list(_places(tree))
    if not places or which % (len(places) + 1) == len(places):
        return how[1]
    holder, key = places[which % (len(places) + 1)]
    kind, value = how
    if kind == "put":
        holder[key] = value
    elif kind == "rename" and isinstance(holder, dict):
        holder["../" + key] = holder.pop(key)
    else:
        del holder[key]
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    # Of a long list a few: else most examples would change one number in the midst of it.
    for key, value in list(items)[:40]:
        yield tree, key
        yield from _places(value)


def _bent_tree(which: int, how: tuple[str, Any]) -> Change:
    return lambda data: json.dumps(bent_tree(json.loads(data), which, how)).encode()


def _bent_line(line: int, which: int, how: tuple[str, Any]) -> Change:
    def change(data: bytes) -> bytes:
        lines = data.splitlines(keepends=True)
        at = line % len(lines)
        lines[at] = json.dumps(bent_tree(json.loads(lines[at]), which, how)).encode() + b"\n"
        return b"".join(lines)

    return change


def _moved_line(line: int, what: str) -> Change:
    def change(data: bytes) -> bytes:
        lines = data.splitlines(keepends=True)
        at = line % len(lines)
        new = {
            "out": [],
            "twice": [lines[at]] * 2,
            "last": [],
            "spoilt": [lines[at][: len(lines[at]) // 2] + b"\n"],
            "deep": [b"[" * DEEP + b"\n"],
        }[what]
        return b"".join(
            [*lines[:at], *new, *lines[at + 1 :], *([lines[at]] if what == "last" else [])]
        )

    return change


def forged(change: Change, head: Path) -> Change:
    """A register whose lines are changed and whose chain and head are made whole again."""

    def bend(data: bytes) -> bytes:
        previous, lines = "0" * 64, []
        for index, line in enumerate(map(json.loads, (change(data) or b"").split(b"\n")[:-1])):
            if isinstance(line, dict):
                line |= {"index": index, "previous": previous}
            lines.append(json.dumps(line).encode())
            previous = hashlib.sha256(lines[-1]).hexdigest()
        head.write_text(json.dumps({"count": len(lines), "head": previous}))
        return b"".join(line + b"\n" for line in lines)

    return bend


def of_values() -> st.SearchStrategy[Change]:
    """One value of one line, so that a chain can be made of the lines again."""
    return of_lines().filter(lambda change: change.__qualname__.startswith("_bent_line"))


@contextmanager
def bent(file: Path, change: Change) -> Iterator[None]:
    """The file changed, and as it was again."""
    before = file.read_bytes()
    now = change(before)
    file.unlink()  # also where it is a link to another's
    try:
        if now is None:
            file.mkdir()
        else:
            file.write_bytes(now)
        yield
    finally:
        shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
        file.write_bytes(before)


def snapshot(*folders: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file and folder."""
    found = {}
    for folder in folders:
        for path in [folder, *sorted(folder.rglob("*"))]:
            about = os.lstat(path)
            found[str(path)] = (about.st_size, about.st_mtime_ns)
    return found


def refused(call: Callable[[], Any], *names: str | Path) -> str | None:
    """What a UserError says, which must be one line with one of the names in it; None: it went
    well."""
    try:
        call()
    except UserError as error:
        said = str(error)
        assert said and said.isprintable() and len(said) < 4000, said
        assert not names or any(str(name) in said for name in names), said
        return said
    return None


def asked(
    main: Callable[[Sequence[str]], int], *argv: str, codes: Sequence[int] = (0, 1)
) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command: one of `codes`, or 2 with one line."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main([*argv])
        except SystemExit as left:  # argparse
            code = int(left.code or 0)
            assert code in (0, 2), code
            return code, out.getvalue(), err.getvalue()
    said = err.getvalue()
    assert code in (*codes, 2), (code, said)
    if code == 2:
        told = [line for line in said.split("\n") if line and not BAR.search(line)]
        assert len(told) == 1 and told[0].isprintable(), said
    out.getvalue().encode()  # what a terminal or a pipe is given
    return code, out.getvalue(), said
