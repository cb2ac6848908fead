import base64
import json
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.data import ranks
from jaxmoe.data.tokenizer import SPECIALS, Tokenizer, bytes_tokenizer
from jaxmoe.data.tokenizer_files import (
    DEFAULT,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from jaxmoe.errors import UserError

_SAMPLE = [Path(__file__).read_text(), Path(ranks.__file__).read_text()] * 2
_TEXT = st.text() | st.text(alphabet=" \t\n\r'self1_9()\u00e9\u4e2d\U0001f600\u0301<|eot|>")
_SMALL = train_tokenizer(_SAMPLE, 900)
_FIVE = ("eot", "pad", "fim_prefix", "fim_middle", "fim_suffix")


@pytest.fixture(scope="module")
def default() -> Tokenizer:
    return load_tokenizer("default")


def _characters(step: int) -> list[str]:
    """Texts that hold every `step`-th character alone, and beside letters, digits and spaces."""
    kept = [chr(c) for c in range(0, 0x110000, step) if not 0xD800 <= c < 0xE000]
    kept += [chr(c) for c in range(0x2100)]
    shown = [f"a{c}b1 {c} 23{c}{c}x\n{c}'{c} \t{c}" for c in kept]
    return ["".join(shown[i : i + 500]) for i in range(0, len(shown), 500)]


def _with_pattern(pattern: str) -> Tokenizer:
    found = ranks.to_ranks(json.loads(_SMALL.json))
    assert found is not None
    return Tokenizer(ranks.to_json(found, pattern, {"<|eot|>": 899}))


def _check_libraries_agree(name: str, step: int) -> None:
    tokenizer = _with_pattern(ranks.PATTERNS[name])
    for text in _characters(step):
        fast = tokenizer.encode_batch([text])[0]
        assert tokenizer._fast, "tiktoken is not used"
        slow = tokenizer._encode_slowly([text])[0]
        assert fast.tolist() == slow.tolist()
        assert tokenizer.decode(fast) == text


@pytest.mark.parametrize("name", ranks.PATTERNS)
def test_both_libraries_cut_characters_alike(name: str):
    _check_libraries_agree(name, 997)


@pytest.mark.slow
@pytest.mark.parametrize("name", ranks.PATTERNS)
def test_both_libraries_cut_all_characters_alike(name: str):
    _check_libraries_agree(name, 1)


@pytest.mark.parametrize("name", ranks.PATTERNS)
def test_both_libraries_give_the_same_ids_of_any_text(name: str):
    tokenizer = _with_pattern(ranks.PATTERNS[name])

    @given(st.lists(_TEXT, max_size=3))
    @settings(deadline=None)  # the first builds the encoder
    def check(texts: list[str]) -> None:
        fast = tokenizer.encode_batch(texts)
        slow = tokenizer._encode_slowly(texts)
        assert [f.tolist() for f in fast] == [s.tolist() for s in slow]
        assert [tokenizer.decode(f) for f in fast] == texts

    check()


def test_the_default_gives_every_text_back(default: Tokenizer):
    assert default.vocab_size == 32_768
    assert default.specials == {role: 32_763 + i for i, role in enumerate(_FIVE)}
    assert default.exact
    assert default.dtype == np.uint16
    names = "".join(n for role in SPECIALS.values() for n in role)

    @given(_TEXT)
    @settings(deadline=None)
    def check(text: str) -> None:
        ids = default.encode_batch([text])[0]
        assert default.decode(ids) == text
        assert not len(ids) or int(ids.max()) < 32_763  # never a special

    check()
    for text in (names, "\ufeff" + unicodedata.normalize("NFD", "\u00e9\u0439"), " " * 1_100_000):
        ids = default.encode_batch([text])[0]
        assert default.decode(ids) == text
        assert int(ids.max()) < 32_763


def test_the_default_file_is_small_and_of_its_recipe(default: Tokenizer):
    about = json.loads(DEFAULT.with_name(DEFAULT.name + ".json").read_text())
    assert about["fingerprint"] == default.fingerprint
    assert "--tier base" in about["recipe"]["command"]
    assert DEFAULT.stat().st_size < 600_000
    text = "def area(self, radius):\n    return math.pi * radius ** 2\n"
    assert len(default.encode_batch([text])[0]) <= 20


def test_bytes_of_ids_make_the_text(default: Tokenizer):
    for tokenizer in (default, _SMALL, bytes_tokenizer()):
        text = "caf\u00e9 \u4e2d <|eot|>\n"
        table = tokenizer.token_bytes()
        assert table is not None
        assert len(table) == tokenizer.vocab_size
        ids = tokenizer.encode_batch([text])[0]
        assert b"".join(table[i] for i in ids) == text.encode()
        assert table[tokenizer.eot] == b""


def test_a_rank_file_is_what_tiktoken_reads(tmp_path: Path):
    path = tmp_path / "mine.tiktoken"
    save_tokenizer(_SMALL, path, {"command": "x"})
    rows = [line.split() for line in path.read_bytes().splitlines()]
    theirs = tiktoken.Encoding(
        "theirs",
        pat_str=ranks.PATTERNS["jaxmoe-2"],
        mergeable_ranks={base64.b64decode(t): int(i) for t, i in rows},
        special_tokens={"<|eot|>": 895},
    )
    ours = load_tokenizer(str(path))
    assert (ours.json, ours.specials["eot"]) == (_SMALL.json, 895)
    for text in (*_SAMPLE, "<|eot|>"):
        assert ours.encode_batch([text])[0].tolist() == theirs.encode_ordinary(text)
        assert ours._encode_slowly([text])[0].tolist() == theirs.encode_ordinary(text)


def test_ranks_that_merges_do_not_lead_to_are_whole_pieces():
    found = {bytes([b]): b for b in range(256)} | {b"abcd": 256, b"ab": 257}
    tokenizer = Tokenizer(ranks.to_json(found, ranks.PATTERNS["gpt2"], {"<|endoftext|>": 258}))
    for text, ids in (("abcd", [256]), ("abcdx", [257, 99, 100, 120])):
        assert tokenizer._encode_slowly([text])[0].tolist() == ids
        assert tokenizer.encode_batch([text])[0].tolist() == ids
    assert tokenizer._fast


def test_without_tiktoken_the_ids_are_the_same(monkeypatch: pytest.MonkeyPatch):
    fast = [ids.tolist() for ids in _SMALL.encode_batch(_SAMPLE)]
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    ranks.encoding.cache_clear()
    slow = Tokenizer(_SMALL.json)
    assert [ids.tolist() for ids in slow.encode_batch(_SAMPLE)] == fast
    assert slow._fast is False
    ranks.encoding.cache_clear()


def _other_tree(**changes: Any) -> dict[str, Any]:
    tree = json.loads(_SMALL.json)
    tree["model"] |= changes
    return tree


def test_what_ranks_cannot_say_goes_the_slow_way():
    plain = _other_tree()
    assert ranks.encoding(json.dumps(plain)) is not None
    merges = plain["model"]["merges"]
    # A token of three or more parts may be listed as merged from others.
    at, (a, b) = next((i, m) for i, m in enumerate(merges) if len(m[0]) > 1 and len(m[1]) > 1)
    wrong = [*merges[:at], [a[0], a[1:] + b], *merges[at + 1 :]]
    swapped = [*merges[:-2], merges[-1], merges[-2]]
    for tree in (
        _other_tree(merges=wrong),
        _other_tree(merges=swapped),
        _other_tree() | {"normalizer": {"type": "NFC"}},
        _other_tree(dropout=0.1),
    ):
        assert ranks.encoding(json.dumps(tree)) is None
    assert not Tokenizer(json.dumps(plain | {"normalizer": {"type": "NFC"}})).exact


def test_sentencepiece_models_are_read(tmp_path: Path):
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(" ".join(_SAMPLE).split("\n")),
        model_prefix=str(tmp_path / "tiny"),
        vocab_size=400,
        byte_fallback=True,
        minloglevel=9,
        hard_vocab_limit=False,
    )
    tokenizer = load_tokenizer(str(tmp_path / "tiny.model"))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tiny.model"))
    text = "the tokenizer of </s> one caf\u00e9"
    ids = tokenizer.encode_batch([text])[0]
    assert ids.tolist() == theirs.encode(text)
    assert tokenizer.eot == theirs.eos_id() not in ids
    assert tokenizer.decode([*ids, tokenizer.eot, *ids]) == f"{text}<|eot|>{text}"
    assert (tokenizer.kind, tokenizer.exact) == ("sentencepiece", False)
    assert tokenizer.token_bytes() is None
    assert Tokenizer(tokenizer.json).fingerprint == tokenizer.fingerprint


def test_a_folder_with_a_tokenizer_is_one(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text(_SMALL.json)
    assert load_tokenizer(str(tmp_path)).fingerprint == _SMALL.fingerprint


def test_training_needs_text_and_room():
    assert train_tokenizer(_SAMPLE, 900).fingerprint == _SMALL.fingerprint
    with pytest.raises(UserError, match="special tokens need 261"):
        train_tokenizer(_SAMPLE, 260)
    with pytest.raises(UserError, match=r"only gives \d+; ask for that"):
        train_tokenizer(["few words"], 900)


_ROWS = b"".join(b"%s %d\n" % (base64.b64encode(bytes([b])), b) for b in range(256))
_BESIDE = '{"pattern": "gpt4", "specials": {"<|endoftext|>": 256}}'


@pytest.mark.parametrize(
    ("name", "data", "beside", "message"),
    [
        ("none.json", None, None, "no such file; give a file, default or bytes"),
        ("a.json", b"{}", None, "a.json: "),
        ("a.json", b"\xff", None, "a.json: "),
        ("a.model", b"nonsense", None, "not a sentencepiece model"),
        ("a.tiktoken", _ROWS, None, "a.tiktoken needs a.tiktoken.json"),
        ("a.tiktoken", _ROWS, "{}", "a.tiktoken.json: KeyError"),
        ("a.tiktoken", b"!! 1\n", _BESIDE, "line 1: not base64"),
        ("a.tiktoken", _ROWS.split(b"\n", 1)[1], _BESIDE, "byte 0 has no rank"),
        ("a.tiktoken", _ROWS, _BESIDE.replace("256", "255"), "two tokens have one id"),
        ("a.tiktoken", _ROWS, _BESIDE.replace("<|endoftext|>", "<x>"), "no end of text"),
        ("a.tiktoken", _ROWS, _BESIDE[:-1] + ', "fingerprint": "0"}', "has changed"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_a_users_error(
    tmp_path: Path, name: str, data: bytes | None, beside: str | None, message: str
):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    if beside:
        (tmp_path / f"{name}.json").write_text(beside)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_only_byte_level_bpe_has_ranks(tmp_path: Path):
    with pytest.raises(UserError, match="a bytes tokenizer has no ranks"):
        save_tokenizer(bytes_tokenizer(), tmp_path / "a.tiktoken", {})
