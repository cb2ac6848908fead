import ast
import gzip
import json
import textwrap
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import jaxmoe
from jaxmoe.data.extract import EXTRACT, Malformed, inflate, split_python, strip_html

_FILES = sorted(Path(jaxmoe.__file__).parent.rglob("*.py"))


def _meaning(text: str) -> str:
    """The tree without the strings that bodies begin with; a body of nothing else is `...`."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        had = bool(node.body)
        while node.body and isinstance(node.body[0], ast.Expr):
            if not isinstance(getattr(node.body[0].value, "value", None), str | type(...)):
                break
            node.body = node.body[1:]
        if had and not node.body and not isinstance(node, ast.Module):
            node.body = [ast.Expr(ast.Constant(...))]
    return ast.dump(tree)


@pytest.mark.parametrize("path", _FILES[::6], ids=lambda p: p.name)
def test_code_means_the_same_without_docstrings_and_comments(path: Path):
    text = path.read_text()
    code, prose = split_python(text)
    assert _meaning(code) == _meaning(text)
    first = ast.get_docstring(ast.parse(text))
    assert first is None or prose.startswith(first.strip())
    assert ast.get_docstring(ast.parse(code)) is None


_PIECES = st.sampled_from(
    ["x = 1", "'#'", '"""#"""', "r'\\'#'", "# c", "if x:", "    pass", "    # in", "", "\u00e9 = 2"]
    + [
        "def f():",
        '    "doc \u00e9"',
        "    'd'; y = 2",
        "    '\u00e9\u00e9\u00e9\u00e9'; yy = 2",
        "class A: 'd'",
        "z = '''a",
        "# b'''",
        "\\",
    ]
    + ["async def g(): # why", "    return f'{x}#'", "\tk = [1, # one", "\t 2]", "try:", "finally:"]
)


@given(st.lists(_PIECES, max_size=12), st.sampled_from(["\n", "\r\n"]))
@example(["def f():", "    '\u00e9\u00e9\u00e9\u00e9'; yy = 2"], "\n")  # columns are in bytes
def test_any_code_that_parses_is_split_safely(lines: list[str], end: str):
    text = end.join(lines)
    try:
        meaning = _meaning(text)
    except SyntaxError:
        assert split_python(text) == ("", "")
        return
    code, _ = split_python(text)
    assert _meaning(code) == meaning


def test_docstrings_and_comments_are_the_prose():
    said = "What this block of code does, in more than forty characters."
    text = f"""
        # Copyright 2020 The Authors, which nobody learns anything from at all.
        def f(x):
            '''First.

            More: # not a comment.
            '''
            # {said[:30]}
            #{said[30:]}
            return '# text'  # short
    """
    code, prose = split_python(textwrap.dedent(text))
    assert prose == f"f: First.\n\nMore: # not a comment.\n\n{said[:30].rstrip()}\n{said[30:]}\n"
    assert code.strip() == "def f(x):\n    return '# text'"


def test_inflate_reads_all_members_and_no_more_than_it_may():
    data = gzip.compress(b"a" * 1000) + gzip.compress(b"b")
    assert inflate(data, 2000) == b"a" * 1000 + b"b"
    for wrong, message in (
        (data[:-3], "cut off"),
        (data[:12] + b"\xff" * 9, "damaged|cut off"),
    ):
        with pytest.raises(Malformed, match=message):
            inflate(wrong, 2000)
    with pytest.raises(Malformed, match="too large"):
        inflate(gzip.compress(b"\0" * 10_000_000), 5000)


def test_html_is_what_a_reader_sees():
    page = (
        "<head><title>no</title></head><h1>One &amp; two</h1><p>a\n  b<script>no()</script></p>"
        "<pre>x\n    y</pre><ul><li>i</li><li>j</li></ul>"
    )
    assert strip_html(page) == "One & two\n\na b\n\nx\n    y\n\ni\n\nj\n"


def test_the_formats_of_packages():
    service = {
        "metadata": {"serviceFullName": "S"},
        "operations": {"Put": {"documentation": "<p>" + "Puts a thing. " * 8 + "</p>"}},
        "shapes": {"T": {"members": {"M": {"documentation": "short"}}}},
    }
    assert EXTRACT["service"](json.dumps(service).encode())[0][1].startswith("Put: Puts a thing.")
    leads = {"b": {"title": "B", "extract": "is."}, "a": {"title": "A", "extract": ""}}
    assert EXTRACT["leads"](json.dumps(leads).encode()) == [(":b", "B\n\nis.\n")]
    entries = "".join(f"Word{i} n.\n   {'meaning ' * 50}\n\n" for i in range(100))
    parts = EXTRACT["dictionary"](entries.encode())
    assert len(parts) == 3
    assert all(text.startswith("Word") for _, text in parts)
    assert " ".join(t for _, t in parts).split() == entries.split()
    with pytest.raises(Malformed, match="not JSON"):
        EXTRACT["leads"](b"{")
