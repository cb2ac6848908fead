import random
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from datasets import prose
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.data import windows
from jaxmoe.data.windows import Index, Method, build_index, find, hashes, passage


def folded(text: str, method: Method) -> list[object]:
    """Windows by the definition, one at a time."""
    letters = [c.lower() for c in text]
    if method == "chars50":
        kept = [c for c in letters if c.isalnum()]
        return ["".join(kept[i : i + 50]) for i in range(len(kept) - 49)]
    words = "".join(c if c.isalnum() else " " for c in letters).split()
    return [tuple(words[i : i + 13]) for i in range(len(words) - 12)]


# Letters that fold to themselves or their lower case, in one, two and three bytes.
ALPHABET = "abcXYZ019 \n.,_\u00df\u03b1\u03a9\u4e2d\u6587\u3001\ud55c"


@pytest.mark.parametrize("method", ["chars50", "ngram13"])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_equal_windows_are_equal_hashes_and_others_differ(method: Method, data: st.DataObject):
    """Against the definition, on texts with few letters, so that windows do repeat."""
    letters = data.draw(st.sampled_from(["ab ", "aB. ", ALPHABET]))
    seed = data.draw(st.integers(0, 2**32))
    size = data.draw(st.integers(0, 400))
    text = "".join(random.Random(seed).choices(letters, k=size)) * data.draw(st.integers(1, 2))
    wanted = folded(text, method)
    found = hashes(text.encode(), method).tolist()
    assert len(found) == len(wanted)
    assert len(set(found)) == len(set(wanted)) == len(set(zip(found, wanted, strict=True)))


@pytest.mark.parametrize("method", ["chars50", "ngram13"])
def test_a_long_text_has_the_windows_of_its_parts(method: Method, monkeypatch: pytest.MonkeyPatch):
    text = prose("long", 700)  # some 2,500 letters
    whole = hashes(text.encode(), method)  # alive: its memory is not taken again below
    monkeypatch.setattr(windows, "_CHUNK", 64)
    windows._powers.cache_clear()
    try:
        assert hashes(text.encode(), method).tolist() == whole.tolist()
    finally:
        windows._powers.cache_clear()


def test_ascii_and_other_text_have_the_same_hashes():
    text = prose(1)
    both = hashes((text + "\u00e9").encode(), "chars50")
    assert both[:-1].tolist() == hashes(text.encode(), "chars50").tolist()
    both = hashes((text + " \u3001").encode(), "ngram13")
    assert both.tolist() == hashes(text.encode(), "ngram13").tolist()


@pytest.mark.parametrize("spread", [0, 1, 2, 3, 4])
def test_layout_case_accents_and_width_do_not_hide_a_passage(spread: int):
    text = "Caf\u00e9 na\u00efve \u00c5ngstr\u00f6m, " + prose(2)
    changed = [
        text.upper(),
        re.sub(r"\s+", "\n\t\u00a0 ", text),
        text.replace(" ", ""),
        unicodedata.normalize("NFD", text),
        "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text),
    ][spread]
    assert changed != text
    found = hashes(changed.encode(), "chars50").tolist()
    assert found == hashes(text.encode(), "chars50").tolist()
    if spread not in (2, 3):  # words are words only with their borders; a mark ends one
        found = hashes(changed.encode(), "ngram13").tolist()
        assert found == hashes(text.encode(), "ngram13").tolist()


def test_hangul_keeps_its_syllables():
    """Its decomposition begins with one of 19 letters: folded to that, texts would be mistaken."""
    rng = random.Random(3)
    texts = ["".join(chr(rng.randrange(0xAC00, 0xD7A4)) for _ in range(60)) for _ in range(2)]
    one = "".join(chr(0xAC00 + (ord(c) - 0xAC00) // 588 * 588) for c in texts[0])  # same initials
    a, b = (set(hashes(t.encode(), "chars50").tolist()) for t in (texts[0], one))
    assert len(a) == len(b) == 11
    assert not a & b


@pytest.mark.parametrize("method", ["chars50", "ngram13"])
def test_texts_together_are_found_as_each_alone(method: Method):
    """Also where a window would lie across two of them, and where one has a few other letters."""
    held = [prose(n) for n in range(6)]
    index, windows = build_index([hashes(t.encode(), method) for t in held])
    assert (windows > 0).all()
    whole = prose("cut", 40)
    parts = [p for t in held[:3] for p in (t[: len(t) // 2], t[len(t) // 2 :])]
    texts = ["", *parts, "\u00e9 " + held[3], prose(90), whole, held[4] + "\u4e2d", "", "a"]
    texts = [t.encode() for t in texts]
    (together,) = find(texts, [index], method)
    for number, text in enumerate(texts):
        (alone,) = find([text], [index], method)
        mine = together.document == number
        assert together.windows[number] == alone.windows[0] == len(hashes(text, method))
        assert together.window[mine].tolist() == alone.window.tolist()
        assert together.place[mine].tolist() == alone.place.tolist()
        known = {h: n for n, h in enumerate(index.hashes.tolist())}
        expected = [known[h] for h in hashes(text, method).tolist() if h in known]
        assert alone.place.tolist() == expected
    assert len(together.place) > (400 if method == "chars50" else 50)


def test_the_index_finds_all_and_nothing_else(tmp_path: Path):
    """Also from its files, and beyond one chunk of the search."""
    rng = np.random.default_rng(4)
    held, others = rng.integers(0, 2**64, (2, 200_000), np.uint64)
    index, _ = build_index([held[:150_000], held[150_000:]])
    index.save(tmp_path)
    for one in (index, Index.open(tmp_path)):
        at, place = one.find(np.concatenate([others, held]))
        assert at.tolist() == list(range(200_000, 400_000))
        assert (one.hashes[place] == held).all()
        assert (one.owners[place] == np.repeat([0, 1], [150_000, 50_000])).all()
    total = index.hashes.nbytes + index.owners.nbytes + index._bitmap.nbytes
    assert total <= 16 * len(index)
    empty, covered = build_index([])
    empty.save(tmp_path)
    for one in (empty, Index.open(tmp_path)):
        assert len(one.find(others)[0]) == len(covered) == 0


def test_a_bloom_filter_spares_most_searches(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(5)
    held, others = rng.integers(0, 2**64, (2, 50_000), np.uint64)
    index, _ = build_index([held])
    asked = []
    search = np.searchsorted
    monkeypatch.setattr(
        windows.np, "searchsorted", lambda a, v, *more: asked.append(len(v)) or search(a, v, *more)
    )
    assert not len(index.find(others)[0])
    assert sum(asked) < 0.03 * len(others)


def test_a_licence_header_is_not_looked_for_and_variants_of_a_text_are():
    header = prose("licence", 90)
    held = [header + prose(n, 200) for n in range(3)]
    index, covered = build_index([hashes(t.encode(), "chars50") for t in held])
    assert not len(find([header.encode()], [index], "chars50")[0].place)
    assert (covered > 0).all()
    every, _ = build_index([hashes(t.encode(), "chars50") for t in held], common=0)
    assert len(find([header.encode()], [every], "chars50")[0].place) == len(
        hashes(header.encode(), "chars50")
    )
    variants = [prose("long", 400) + str(n) for n in range(5)]
    index, covered = build_index([hashes(t.encode(), "chars50") for t in variants])
    assert covered.min() > 1_000
    index, covered = build_index([hashes(t.encode(), "chars50") for t in [header] * 3 + ["short"]])
    assert covered.tolist() == [0, 0, 0, 0]  # counted as not to be checked


def test_a_passage_is_shown_as_it_is_written():
    text = 'He said: "So  it\nis", ' + prose(7)
    for before in ("", "\u00e9", "\u4e2d, "):
        shown = passage((before + text).encode(), "chars50", sum(map(str.isalnum, before)))
        assert text.startswith(shown)
        assert sum(map(str.isalnum, shown)) == 50
    words = passage(text.encode(), "ngram13", 2)
    assert words.startswith("So  it\nis")
    assert len(re.findall(r"\w+", words)) == 13
    last = len(hashes(text.encode(), "ngram13")) - 1
    assert passage(text.encode(), "ngram13", last) == " ".join(text.split()[-13:]).rstrip(".")
