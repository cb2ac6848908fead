import numpy as np
import pytest
from datasets import prose

from jaxmoe.data.store import StoredSource
from jaxmoe.data.texts import Decoder, document_texts
from jaxmoe.data.tokenizer import EOT, Tokenizer, bytes_tokenizer, train_bpe

TEXTS = [prose(n, 30) for n in range(40)] + ["", "\u4e2d\u6587 \U0001f600\x00\x7f", EOT, "\r\n\t "]


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return bytes_tokenizer() if request.param == "bytes" else train_bpe(TEXTS, 300)


def test_stored_documents_come_back_byte_for_byte(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    """In reads of a few documents, of one that is longer than a read, and from the middle."""
    monkeypatch.setattr("jaxmoe.data.texts._READ", 200)
    ids = tokenizer.encode_batch(TEXTS)
    eot = np.array([tokenizer.eot], tokenizer.dtype)
    row = np.concatenate([eot, *(part for i in ids for part in (i, eot))])
    source = StoredSource("s", [row[:100], row[100:]], 1 + np.cumsum([len(i) + 1 for i in ids]))
    decoder = Decoder(tokenizer)
    for start, stop in ((0, len(TEXTS)), (5, 9), (41, 44), (7, 7)):
        reads = list(document_texts(source, start, stop, decoder))
        assert [first for first, _ in reads] == [
            start + sum(len(texts) for _, texts in reads[:n]) for n in range(len(reads))
        ]
        assert [t.decode() for _, texts in reads for t in texts] == TEXTS[start:stop]
    assert len(list(document_texts(source, 0, len(TEXTS), decoder))) > 3
    assert decoder.text(ids[0]) == TEXTS[0].encode()


def test_a_tokenizer_without_a_table_is_asked_to_decode():
    class Upper(Tokenizer):
        def token_bytes(self) -> None:
            return None

        def decode(self, ids: object) -> str:
            return super().decode(ids).upper()  # type: ignore[arg-type]

    tokenizer = Upper('{"kind": "bytes"}')
    (ids,) = tokenizer.encode_batch(["some text"])
    assert Decoder(tokenizer).text(np.append(ids, tokenizer.eot)) == b"SOME TEXT"
