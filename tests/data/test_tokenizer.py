import argparse
import inspect
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxmoe.data.tokenizer import EOT, Tokenizer, bytes_tokenizer, train_bpe
from jaxmoe.errors import UserError

_CODE = "class Box:\n    def get(self, key):\n\n        return self.data['self'][key]\n\n\n" * 20
_PROSE = inspect.getsource(argparse)
_BPE = train_bpe([_PROSE[:40_000], _CODE], 400)
_TEXT = st.text() | st.text(alphabet=" \t\n\r\\'self1_()\u00e9\u4e2d\U0001f600", max_size=60)


@pytest.mark.parametrize("tokenizer", [_BPE, bytes_tokenizer()], ids=["bpe", "bytes"])
def test_round_trip_is_exact_for_every_text(tokenizer: Tokenizer):
    @given(st.lists(_TEXT, max_size=4))
    @example([EOT, f"a{EOT}b", "", "\ufeff bom", "e\u0301 caf\u00e9", " " * 3000, "\r\n \n\t x"])
    def check(texts: list[str]) -> None:
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            assert ids.dtype == np.uint16
            assert tokenizer.decode(ids) == text
            assert tokenizer.eot not in ids
            assert not len(ids) or int(ids.max()) < tokenizer.vocab_size

    check()


def test_vocabulary_is_exact_and_every_id_decodes():
    assert _BPE.vocab_size == 400
    assert bytes_tokenizer().vocab_size == 257
    assert bytes_tokenizer().eot == 256
    for tokenizer in (_BPE, bytes_tokenizer()):
        assert tokenizer.decode([tokenizer.eot]) == EOT
        assert all(tokenizer.decode([i]) for i in range(tokenizer.vocab_size))


def test_a_line_end_with_its_indentation_is_one_token():
    tokenizer = train_bpe([_CODE], 295)
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode_batch([_CODE])[0]]
    assert "\n    " in pieces
    assert "\n\n        " in pieces
    assert {" self", "self", "return"} <= set(pieces)


def test_merges_save_tokens():
    text = _PROSE[50_000:60_000]
    assert len(_BPE.encode_batch([text])[0]) < 0.7 * len(text)


def test_same_text_same_tokenizer_in_another_process():
    code = (
        "import sys; from jaxmoe.data.tokenizer import train_bpe;"
        "print(train_bpe([sys.stdin.read()], 420).fingerprint)"
    )
    text = _PROSE[:30_000]
    run = subprocess.run(
        [sys.executable, "-c", code], input=text, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == train_bpe([text], 420).fingerprint
    assert train_bpe([_PROSE[30_000:60_000]], 420).fingerprint != train_bpe([text], 420).fingerprint


def test_saved_text_gives_the_same_tokenizer():
    again = Tokenizer(_BPE.json)
    assert (again.fingerprint, again.eot) == (_BPE.fingerprint, _BPE.eot)
    assert (
        again.encode_batch([_CODE + EOT])[0].tolist()
        == _BPE.encode_batch([_CODE + EOT])[0].tolist()
    )


def test_a_vocabulary_that_cannot_be_learnt_is_a_users_error():
    with pytest.raises(UserError, match=r"model.vocab_size=5000.*set it to \d+ or less"):
        train_bpe(["a few words, a few words"], 5000)
    with pytest.raises(UserError, match="at least 257"):
        train_bpe(["text"], 256)
