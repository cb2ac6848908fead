"""The register: whatever is done to its bytes shows, and a kill at any moment does not."""

import hashlib
import json
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
from forecast_cases import outcome, record
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxmoe.errors import UserError
from jaxmoe.forecast.curve import canonical_observations
from jaxmoe.forecast.register import (
    anchor_path,
    append,
    observations,
    read,
    repair_torn,
    verify,
)


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1]


def write(path: Path, lines: list[bytes]) -> None:
    path.write_bytes(b"".join(line + b"\n" for line in lines))


def test_a_sound_register_has_no_problems(sealed: Path) -> None:
    assert verify(sealed) == []
    records = read(sealed)
    assert [r["index"] for r in records] == [0, 1, 2, 3, 4]
    assert records[0]["previous"] == "0" * 64
    for before, after in zip(lines_of(sealed)[:-1], records[1:], strict=True):
        assert after["previous"] == hashlib.sha256(before).hexdigest()
    anchor = json.loads(anchor_path(sealed).read_text())
    assert anchor == {"count": 5, "head": hashlib.sha256(lines_of(sealed)[-1]).hexdigest()}


def test_append_returns_what_it_wrote(tmp_path: Path) -> None:
    path = tmp_path / "new" / "forecasts.jsonl"
    written = append(path, record())
    assert read(path) == [written]
    assert written["time"].endswith("+00:00")


def test_every_field_of_every_line_is_guarded(sealed: Path) -> None:
    original = lines_of(sealed)
    for number, line in enumerate(original):
        fields = json.loads(line)
        for name, value in fields.items():
            for changed in ({**fields, name: edited(value)}, without(fields, name)):
                forged = list(original)
                forged[number] = json.dumps(changed, separators=(",", ":")).encode()
                write(sealed, forged)
                problems = verify(sealed)
                assert problems, (number, name)
                assert {p.line for p in problems} & {number + 1, number + 2}, (number, name)


def edited(value: object) -> object:
    if isinstance(value, dict):
        return {**value, next(iter(value)): 2.95}
    return value + 1 if isinstance(value, int | float) else f"{value}x"


def without(fields: dict, name: str) -> dict:
    return {k: v for k, v in fields.items() if k != name}


@pytest.mark.parametrize("number", range(5))
def test_a_removed_line_shows(sealed: Path, number: int) -> None:
    lines = lines_of(sealed)
    write(sealed, lines[:number] + lines[number + 1 :])
    assert verify(sealed)


@pytest.mark.parametrize("pair", list(combinations(range(5), 2)))
def test_swapped_lines_show(sealed: Path, pair: tuple[int, int]) -> None:
    lines, (a, b) = lines_of(sealed), pair
    lines[a], lines[b] = lines[b], lines[a]
    write(sealed, lines)
    assert verify(sealed)[0].line in (a + 1, b + 1)


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("where", range(6))
def test_a_duplicated_line_shows(sealed: Path, number: int, where: int) -> None:
    lines = lines_of(sealed)
    write(sealed, lines[:where] + [lines[number]] + lines[where:])
    assert verify(sealed)


@pytest.mark.parametrize("kept", range(5))
def test_a_truncated_tail_shows(sealed: Path, kept: int) -> None:
    write(sealed, lines_of(sealed)[:kept])
    problems = verify(sealed)
    assert any(p.line == kept + 1 and "removed" in p.what for p in problems)


def test_a_removed_file_shows(sealed: Path) -> None:
    sealed.unlink()
    assert "removed" in str(verify(sealed)[0])
    anchor_path(sealed).unlink()
    with pytest.raises(UserError, match="no such file"):
        verify(sealed)


@given(data=st.data())
@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_changed_bytes_show(sealed: Path, data: st.DataObject) -> None:
    pristine = sealed.with_suffix(".pristine")
    if not pristine.exists():
        shutil.copy(sealed, pristine)
    original = pristine.read_bytes()
    start = data.draw(st.integers(0, len(original)))
    end = data.draw(st.integers(start, min(len(original), start + 40)))
    changed = original[:start] + data.draw(st.binary(max_size=40)) + original[end:]
    sealed.write_bytes(changed)
    assert bool(verify(sealed)) == (changed != original)


def test_a_forged_chain_fails_at_the_anchor(sealed: Path) -> None:
    lines, previous = [], "0" * 64
    for line in lines_of(sealed):
        fields = {**json.loads(line), "previous": previous}
        if fields["index"] == 2:
            fields["loss"] = {**fields["loss"], "median": 3.05}
        lines.append(json.dumps(fields, separators=(",", ":")).encode())
        previous = hashlib.sha256(lines[-1]).hexdigest()
    write(sealed, lines)
    assert [p.line for p in verify(sealed)] == [5]


def test_lines_are_numbered_even_in_a_whole_chain(tmp_path: Path) -> None:
    path = tmp_path / "forecasts.jsonl"
    append(path, record())
    line = path.read_bytes().replace(b'"index":0', b'"index":1')
    path.write_bytes(line)
    head = hashlib.sha256(line[:-1]).hexdigest()
    anchor_path(path).write_text(json.dumps({"count": 1, "head": head}))
    assert "has index 1 where 0 belongs" in str(verify(path)[0])


@pytest.mark.parametrize(
    "anchor", [b"", b"{}", b"[1]", b'{"count": "5", "head": ""}', b'{"count": 2, "head": "x"}']
)
def test_a_damaged_anchor_shows(sealed: Path, anchor: bytes) -> None:
    anchor_path(sealed).write_bytes(anchor)
    assert verify(sealed)


def test_a_missing_anchor_shows(sealed: Path) -> None:
    anchor_path(sealed).unlink()
    assert "missing" in str(verify(sealed)[0])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_kill_before_the_anchor_is_no_error_and_is_mended(tmp_path: Path, count: int) -> None:
    path, anchor = tmp_path / "forecasts.jsonl", tmp_path / "forecasts.head.json"
    before = None
    for step in range(count):
        before = anchor.read_bytes() if anchor.exists() else None
        append(path, record(200 + step))
    if before is None:
        anchor.unlink()
    else:
        anchor.write_bytes(before)
    assert verify(path) == []
    append(path, record(400))
    assert verify(path) == []
    assert json.loads(anchor.read_text())["count"] == count + 1


def test_two_lines_past_the_anchor_show(tmp_path: Path) -> None:
    path = tmp_path / "forecasts.jsonl"
    append(path, record(200))
    old = anchor_path(path).read_bytes()
    append(path, record(300))
    append(path, record(400))
    anchor_path(path).write_bytes(old)
    assert "were added" in str(verify(path)[0])


@pytest.mark.parametrize("cut", [1, 20, -1])
def test_a_torn_line_is_found_and_only_it_is_removed(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "forecasts.jsonl"
    append(path, record(200))
    append(path, record(300))
    whole, head = path.read_bytes(), anchor_path(path).read_bytes()
    append(path, record(400))
    line = lines_of(path)[-1]
    path.write_bytes(whole + line[:cut])
    anchor_path(path).write_bytes(head)
    assert [p.line for p in verify(path)] == [3]
    with pytest.raises(UserError, match="torn"):
        read(path)
    with pytest.raises(UserError, match="damaged register: line 3: torn"):
        append(path, record(400))
    assert repair_torn(path) is True
    assert path.read_bytes() == whole and verify(path) == []
    assert repair_torn(path) is False


def test_a_line_that_was_whole_is_not_repaired_away(sealed: Path) -> None:
    sealed.write_bytes(sealed.read_bytes()[:-1])
    before = sealed.read_bytes()
    with pytest.raises(UserError, match="was once complete"):
        repair_torn(sealed)
    assert sealed.read_bytes() == before


def test_nothing_follows_an_outcome(sealed: Path) -> None:
    with pytest.raises(UserError, match="closed by the outcome in line 5"):
        append(sealed, record(600))


def test_a_damaged_register_is_not_extended(sealed: Path) -> None:
    write(sealed, lines_of(sealed)[:3])
    with pytest.raises(UserError, match="the end was removed"):
        append(sealed, record(600))


BAD = {
    "kind": record(kind="guess"),
    "law": without(record(), "law"),
    "q95": record(loss={"median": 3.0}),
    "rise": record(loss={"q05": 3.0, "q25": 2.9, "median": 3.1, "q75": 3.2, "q95": 3.3}),
    "finite": outcome(float("nan")),
    "index": record(index=4),
    "JSON": record(note={1, 2}),
}


@pytest.mark.parametrize("what", BAD)
def test_a_senseless_record_is_refused_and_nothing_is_written(tmp_path: Path, what: str) -> None:
    path = tmp_path / "forecasts.jsonl"
    append(path, record())
    before = path.read_bytes()
    with pytest.raises(UserError, match=what):
        append(path, BAD[what])
    assert path.read_bytes() == before and verify(path) == []


def evals(rows: list[tuple[int, float]], **changes: object) -> str:
    base = {"set": "stdlib", "set_fingerprint": "f00", "bits_per_byte": 1.0, **changes}
    return "".join(
        json.dumps({"step": step, "tokens": step * 2048, "nll": nll, **base}) + "\n"
        for step, nll in rows
    )


def with_evals(folder: Path, rows: list[tuple[int, float]]) -> Path:
    (folder / "evals.jsonl").write_text(evals(rows) + evals(rows, set="b", set_fingerprint="b0"))
    path = folder / "forecasts.jsonl"
    for cutoff in (200, 300):
        pairs = [pair for pair in rows if pair[0] <= cutoff]
        text = canonical_observations([s for s, _ in pairs], [v for _, v in pairs])
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        append(path, record(cutoff, observations_sha256=sha256))
    append(path, outcome(3.05))
    return path


ROWS = [(100, 4.4), (200, 4.1), (250, 3.9), (300, 3.7), (1000, 3.05)]


@pytest.mark.parametrize("at", range(5))
def test_edited_evals_show(tmp_path: Path, at: int) -> None:
    path = with_evals(tmp_path, ROWS)
    assert verify(path) == []
    rows = list(ROWS)
    rows[at] = (rows[at][0], rows[at][1] + 1e-9)
    (tmp_path / "evals.jsonl").write_text(evals(rows))
    expected = [[1, 2], [1, 2], [2], [2], [3]][at]
    assert [p.line for p in verify(path)] == expected
    (tmp_path / "evals.jsonl").write_text(evals(ROWS[:at] + ROWS[at + 1 :]))
    assert [p.line for p in verify(path)] == expected


def test_other_sets_and_later_evals_do_not_matter(tmp_path: Path) -> None:
    path = with_evals(tmp_path, ROWS)
    other = evals([(50, 9.0), (300, 9.0)], set="b", set_fingerprint="b0")
    (tmp_path / "evals.jsonl").write_text(other + evals(ROWS))
    assert verify(path) == []
    assert verify(path, tmp_path / "evals.jsonl") == []
    with pytest.raises(UserError, match="no such file"):
        verify(path, tmp_path / "elsewhere.jsonl")


def test_a_resume_rewinds_the_observations() -> None:
    rows = [
        {"set_fingerprint": "f", "step": step, "nll": nll}
        for step, nll in [(50, 5.0), (100, 4.0), (150, 9.0), (100, 4.1), (150, None), (200, 3.5)]
    ]
    assert observations(rows, set_fingerprint="f", until=150) == ([50, 100], [5.0, 4.1])
    assert observations(rows, set_fingerprint="f", until=999) == ([50, 100, 200], [5.0, 4.1, 3.5])
    assert observations(rows, set_fingerprint="g", until=999) == ([], [])


def test_a_rollback_after_a_forecast_is_no_tampering(tmp_path: Path) -> None:
    rows = ROWS[:4]
    text = canonical_observations([s for s, _ in rows], [v for _, v in rows])
    path = tmp_path / "forecasts.jsonl"
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    append(path, record(300, observations_sha256=sha256, evals_lines=4))
    (tmp_path / "evals.jsonl").write_text(evals(rows) + evals([(200, 4.2), (300, 3.8)]))
    assert verify(path) == []
    (tmp_path / "evals.jsonl").write_text(evals([(100, 4.4), (200, 4.2), (300, 3.8)]))
    assert [p.line for p in verify(path)] == [1]


@pytest.mark.parametrize("bad", [{"train_fingerprint": ""}, {"leaking": -1}, {"leaking": None}])
@pytest.mark.parametrize("make", [record, outcome])
def test_a_set_that_was_not_compared_with_the_training_text_is_refused(
    tmp_path: Path, make: Callable[..., dict], bad: dict
) -> None:
    with pytest.raises(UserError, match="'stdlib' was not compared with the training text"):
        append(tmp_path / "forecasts.jsonl", make(**bad))
    (name,) = bad
    without = {k: v for k, v in make().items() if k != name}
    with pytest.raises(UserError, match="was not compared"):
        append(tmp_path / "forecasts.jsonl", without)
