import random
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from jaxmoe.data.holdout import Overlap, split, take
from jaxmoe.data.sources import File, folder
from jaxmoe.errors import UserError


def _files(sizes: dict[str, int]) -> list[File]:
    return [
        File(
            package=name.split("/")[0], name=name, path=Path(name), size=n, mtime_ns=0, kind="text"
        )
        for name, n in sizes.items()
    ]


def _names(files: Sequence[File]) -> set[str]:
    return {f.name for f in files}


def _letters(seed: int, count: int) -> bytes:
    return "".join(random.Random(seed).choices("abcdefghij (),.\n", k=count)).encode()


def test_named_packages_go_whole():
    files = _files({f"{p}/{n}": 10 for p in "abc" for n in range(3)})
    parts = split(files, ("b",), "here")
    assert _names(parts.heldout) == {"b/0", "b/1", "b/2"}
    assert _names(parts.train) == _names(files) - _names(parts.heldout)


def test_an_unknown_name_is_an_error_with_the_nearest():
    files = _files({"email/x": 10, "http/x": 10})
    with pytest.raises(UserError, match="'emial'.*did you mean 'email'"):
        split(files, ("emial",), "here")
    with pytest.raises(UserError, match="every package"):
        split(files, ("email", "http"), "here")


def test_without_names_a_twentieth_of_the_packages_by_hash_of_the_name():
    sizes = {f"p{n}/{m}": 10 for n in range(60) for m in range(2)}
    parts = split(_files(sizes), (), "here")
    assert len(parts.packages) == 3
    assert {f.package for f in parts.heldout} == set(parts.packages)
    assert not {f.package for f in parts.train} & set(parts.packages)
    grown = split(_files({**sizes, "p7/new": 500}), (), "here")
    assert grown.packages == parts.packages  # text and sizes do not choose


def test_a_package_with_most_of_the_text_is_not_held_out():
    for big in ("a", "b"):
        files = _files({"a/x": 10, "b/x": 10, f"{big}/y": 1000})
        assert split(files, (), "here").packages == ("b" if big == "a" else "a",)


def test_a_single_package_is_parted_by_document():
    files = _files({f"only/{n}": 10 for n in range(40)})
    parts = split(files, (), "here")
    assert parts.packages == ()
    assert len(parts.heldout) == 2
    assert not _names(parts.heldout) & _names(parts.train)
    with pytest.raises(UserError, match="cut it into two"):
        split(files[:1], (), "here")


def test_the_cap_holds_whole_documents_of_every_part_of_the_alphabet(texts: Path):
    files = folder(str(texts)).files
    cap = sum(f.size for f in files) // 2
    taken = take(files, cap, lambda document: None)
    assert 0.9 * cap < taken.bytes <= cap
    assert taken.bytes == sum(len(d.data) for d in taken.documents)
    assert taken.dropped == {"over the cap": len(files) - len(taken.documents)}
    assert all(d.data == (texts / d.name).read_bytes() for d in taken.documents)
    tight = round(2.9 * files[0].size)
    assert 0.6 * tight < take(files, tight, lambda document: None).bytes <= tight
    names = [d.name for d in taken.documents]
    assert names != sorted(names)
    assert len({d.package for d in taken.documents}) > 18


def test_overlap_counts_exactly_the_shared_windows():
    held = [_letters(n, 3000) for n in range(4)]
    text = _letters(9, 400) + held[1][500:900] + _letters(10, 300) + held[3][:200]
    squeezed = [re.sub(rb"[^a-z]", b"", t) for t in [*held, text]]
    windows = [{t[i : i + 50] for i in range(len(t) - 49)} for t in squeezed[:-1]]
    known = set().union(*windows)
    last = squeezed[-1]
    expected = sum(last[i : i + 50] in known for i in range(len(last) - 49))
    assert expected > 200
    assert Overlap(held).shared(text) == (expected, len(last) - 49)


def test_overlap_sees_through_layout_and_over_chunks():
    held = _letters(1, 2000)
    spread = re.sub(rb"(.)", rb"\1 ", held, flags=re.S)
    assert Overlap([held]).leaks(spread)
    long = _letters(2, 1_800_000)  # more letters than are hashed at a time
    assert Overlap([held]).shared(long)[0] == 0
    kept = len(re.sub(rb"[^a-z]", b"", held))
    assert Overlap([held]).shared(long + held)[0] == kept - 49
    edge = re.sub(rb"[^a-z]", b"", long)[: (1 << 20) - 300]  # held lies across the chunks' border
    assert Overlap([held]).shared(edge + held)[0] == kept - 49


def test_a_licence_header_is_no_leak_and_a_copied_file_is():
    header = _letters(0, 2000)
    held = [header + _letters(n, 4000) for n in (1, 2, 3)]
    overlap = Overlap(held)
    assert not overlap.leaks(header + _letters(7, 5000))
    assert Overlap(held[:2]).leaks(header + _letters(7, 5000))
    assert overlap.leaks(held[0][2000:] + _letters(8, 100_000))  # 1,000 windows, if 4 % of them
    assert not overlap.leaks(held[0][2000:2400] + _letters(8, 10_000))
    assert overlap.leaks(held[0][2000:2400] + _letters(8, 500))  # a third, if 250 windows
    assert not Overlap([]).leaks(held[0])
    assert not overlap.leaks(b"short")
