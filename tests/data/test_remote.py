"""Data sets at URLs: the same stream, of what is fed alone."""

import gc
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import prose, write

from jaxmoe.config import (
    Config,
    DataConfig,
    LengthStage,
    ModelConfig,
    SourceConfig,
    TrainConfig,
    replace,
)
from jaxmoe.curriculum import curriculum
from jaxmoe.data import feed, remote
from jaxmoe.data.__main__ import main
from jaxmoe.data.ahead import STEPS, Ahead
from jaxmoe.data.cache import Corpus
from jaxmoe.data.damage import Damaged
from jaxmoe.data.dataset import DataSet, open_data_set
from jaxmoe.data.heldout_sets import move_to_set
from jaxmoe.data.mixture import Mixture
from jaxmoe.data.opened import open_corpus
from jaxmoe.errors import UserError


class Server(ThreadingHTTPServer):
    """Of a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.served: list[tuple[str, int, int]] = []  # file, first byte, end
        self.fails: dict[str, int] = {}  # how often a file fails first


class Handler(SimpleHTTPRequestHandler):
    """Serves ranges, and writes down which."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        whole, wanted = path.read_bytes(), self.headers["Range"]
        fails = self.server.fails
        if fails.get(path.name, 0):
            fails[path.name] -= 1
            self.send_error(503)
            return
        start, stop = 0, len(whole)
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            start, stop = int(first), min(int(last) + 1, len(whole)) if last else len(whole)
            if start >= len(whole):
                self.send_error(416)
                return
        part = whole[start:stop]
        self.server.served.append((path.name, start, stop))
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(part)))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(whole)}")
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    thread = threading.Thread(target=made.serve_forever, args=(0.05,))
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    """Two sources of several shards, of which some documents are held out."""
    found = tmp_path / "set"
    documents = {
        name: [(f"{name}{i}", f"{i}.txt", prose(f"{name} {i}", 400)) for i in range(30)]
        for name in ("code", "text")
    }
    write(found, documents, shard_bytes=30_000)
    move_to_set(found, "held", ["code"], lambda *_: None, packages=["code3"])
    return open_data_set(found)


def config(path: object, cache: Path, **more: Any) -> Config:
    mix = (
        SourceConfig(name="code", weight=3.0, fim_rate=more.pop("fim", 0.0)),
        SourceConfig(name="text"),
    )
    data = DataConfig(path=str(path), cache=str(cache), sources=mix, **more)
    ramp = (LengthStage(tokens=0, seq_len=32), LengthStage(tokens=1024, seq_len=64))
    train = TrainConfig(steps=6, batch_size=4, seq_len=64, length_ramp=ramp)
    return Config(model=ModelConfig(vocab_size=264), data=data, train=train)


def url(server: Server, name: str = "set") -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/{name}"


def read(config: Config, corpus: Corpus, halves: bool = False) -> list[np.ndarray]:
    """Every array of every step; in two parts, as two devices ask for them."""
    stream = feed.open_stream(config, corpus)
    found: list[np.ndarray] = []
    for step in range(config.train.steps):
        batch = curriculum(config).at(step).shape.batch
        cuts = (0, batch // 2, batch) if halves else (0, batch)
        for start, stop in zip(cuts, cuts[1:], strict=False):
            found += feed.read_rows(stream, config, step, start, stop)
    return found


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("scheme", ["http", "file"])
@pytest.mark.parametrize(
    "more", [{}, {"packing": "best_fit", "document_mask": True}], ids=["split", "best_fit"]
)
def test_a_url_gives_the_stream_of_the_folder(
    data: DataSet, server: Server, tmp_path: Path, scheme: str, more: dict[str, Any]
):
    local = config(data.folder, tmp_path / "a", **more)
    path = url(server) if scheme == "http" else f"file://{data.folder}"
    there = config(path, tmp_path / "b", **more)
    whole, far = open_corpus(local), open_corpus(there)
    assert far.fingerprint == whole.fingerprint
    assert np.array_equal(far.heldout.tokens, whole.heldout.tokens)
    stream = feed.open_stream(there, far)
    assert isinstance(stream, Ahead) and stream.used == feed.used(feed.open_stream(local, whole))
    assert same(read(there, far, halves=True), read(local, whole, halves=True))
    assert len(data.manifest["sources"]["text"]["shards"]) > 2
    # A resumed run asks for a later step first.
    fresh = feed.open_stream(there, far).rows(4, 1, 3)  # type: ignore[union-attr]
    assert same(list(fresh), list(feed.open_stream(local, whole).rows(4, 1, 3)))


def test_only_what_is_fed_is_read(data: DataSet, server: Server, tmp_path: Path):
    """A host's own rows, to the block; of ends and names of training text nothing at all."""
    there = config(url(server), tmp_path / "b")
    far = open_corpus(there)
    trained = data.manifest["sources"].values()
    shards = {s for entry in trained for s in entry["shards"]}
    assert not shards & {name for name, _, _ in server.served}
    late = {entry[part] for entry in trained for part in ("ends", "names")}
    stream = feed.open_stream(there, far)
    assert isinstance(stream, Mixture)
    # After step 0 more of its kind could be read ahead, after step 3 none: batches change.
    assert [stream_batch(there, step) for step in range(5)] == [8, 8, 8, 8, 4]
    for step, known in ((0, 1 + STEPS), (3, 4)):
        feed.read_rows(stream, there, step, 0, 4)  # the rows of one host of two
        stop_drawing(stream)
        wanted: dict[str, set[int]] = {}
        for sample in (s for n in range(known) for s in stream.samples(n, 0, 4)):
            for span in stream.spans(sample):
                add_blocks(data, sample.source, span.start, span.stop + 1, wanted)
        got: dict[str, set[int]] = {}
        for name, start, stop in server.served:
            if name in shards:
                blocks = range(start // remote.BLOCK, -(-stop // remote.BLOCK))
                got.setdefault(name, set()).update(blocks)
        assert got == wanted
    served = sum(stop - start for name, start, stop in server.served if name in shards)
    assert 0 < served < 0.5 * sum(data.manifest["files"][s]["bytes"] for s in shards)
    assert not late & {name for name, _, _ in server.served}


def stream_batch(config: Config, step: int) -> int:
    return curriculum(config).at(step).shape.batch


def stop_drawing(stream: Mixture) -> None:
    """Waits for what is under way."""
    assert isinstance(stream, Ahead)
    for due in list(stream._coming.values()):
        due.result()


def add_blocks(
    data: DataSet, source: str, start: int, stop: int, wanted: dict[str, set[int]]
) -> None:
    """The blocks that tokens start .. stop of a source lie in, by shard."""
    width, at = np.dtype(data.manifest["tokenizer"]["dtype"]).itemsize, 0
    for shard in data.manifest["sources"][source]["shards"]:
        size = data.manifest["files"][shard]["bytes"]
        first, last = max(0, start * width - at), min(size, stop * width - at)
        if first < last:
            blocks = range(first // remote.BLOCK, -(-last // remote.BLOCK))
            wanted.setdefault(shard, set()).update(blocks)
        at += size


def test_threads_end_with_their_stream(data: DataSet, tmp_path: Path):
    """And with a failure of a row the step fails, in whoever asked for it."""
    there = config(f"file://{data.folder}", tmp_path / "b")
    before = set(threading.enumerate())
    stream = feed.open_stream(there, open_corpus(there))
    assert isinstance(stream, Ahead)
    stream.rows(0, 0, 4)
    mine = set(threading.enumerate()) - before
    assert len(mine) > 8
    stop_drawing(stream)
    for shard in data.folder.glob("*-0*.bin"):
        shard.unlink()
    with pytest.raises(Damaged):
        stream.rows(5, 0, 4)
    stop = time.monotonic() + 10
    del stream
    while any(thread.is_alive() for thread in mine) and time.monotonic() < stop:
        gc.collect()
        time.sleep(0.01)
    assert not any(thread.is_alive() for thread in mine)


def test_a_block_is_read_once_and_few_are_kept(
    data: DataSet, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = open_corpus(config(url(server), tmp_path / "b")).sources["text"]
    server.served.clear()
    source.read(0, 400)
    assert [s[1:] for s in server.served] == [(0, remote.BLOCK)]
    source.read(300, 700)
    assert [s[1:] for s in server.served[1:]] == [(remote.BLOCK, 2 * remote.BLOCK)]
    source.read(10, 700)
    assert len(server.served) == 2
    monkeypatch.setattr(remote, "CACHED", 2 * remote.BLOCK)
    source.read(1600, 1700)  # the third from the last now pushes the first out
    source.read(0, 10)
    assert len(server.served) == 4


def test_what_is_kept_is_not_brought_again(data: DataSet, server: Server, tmp_path: Path):
    there = config(url(server), tmp_path / "b")
    corpus = open_corpus(there)
    corpus.names["code"][2]
    corpus.sources["code"].bounds(2)
    assert {n for n, _, _ in server.served} >= {data.manifest["sources"]["code"]["ends"]}
    server.served.clear()
    again = open_corpus(there)
    assert again.names["code"][2] == data.names["code"][2]
    assert again.sources["code"].bounds(2) == data.sources["code"].bounds(2)
    assert {n for n, _, _ in server.served} == {"manifest.json"}


def test_a_server_that_fails_is_asked_again(data: DataSet, server: Server, tmp_path: Path):
    corpus = open_corpus(config(url(server), tmp_path / "b"))
    shard = data.manifest["sources"]["text"]["shards"][0]
    server.fails[shard] = 1
    assert np.array_equal(corpus.sources["text"].read(0, 9), data.sources["text"].read(0, 9))
    assert server.fails[shard] == 0


@pytest.mark.parametrize("harm", ["cut", "missing"])
def test_a_shard_that_is_cut_off_there(data: DataSet, server: Server, tmp_path: Path, harm: str):
    shard = data.folder / data.manifest["sources"]["text"]["shards"][1]
    raw = shard.read_bytes()
    shard.write_bytes(raw[:100]) if harm == "cut" else shard.unlink()
    first = 30_000 // 2
    stops = open_corpus(config(url(server), tmp_path / "b"))
    with pytest.raises(Damaged, match=rf"http.*{shard.name} is missing, or has not its 30000"):
        stops.sources["text"].read(first + 2000, first + 2005)
    assert stops.guard is not None and len(stops.guard.news()) == 1
    skips = open_corpus(config(url(server), tmp_path / "b", damaged="skip"))
    assert (skips.sources["text"].read(first + 2000, first + 2005) == -1).all()


def test_verify_and_inspect_take_a_url(data: DataSet, server: Server, tmp_path: Path, capsys: Any):
    assert main(["verify", url(server)]) == 0
    assert "0 of" in capsys.readouterr().out
    where = [f"--set=data.path={url(server)}", f"--set=data.cache={tmp_path / 'b'}"]
    sets = ["--set=model.vocab_size=264", "--set=train.seq_len=64", "--set=train.batch_size=2"]
    assert main(["inspect", *where, "--set=data.holdout=()", *sets, "--step", "2"]) == 0
    assert ".txt" in capsys.readouterr().out
    shard = data.folder / data.manifest["sources"]["code"]["shards"][0]
    raw = bytearray(shard.read_bytes())
    raw[5] ^= 1
    shard.write_bytes(raw)
    assert main(["verify", f"file://{data.folder}"]) == 1
    assert "1 of" in capsys.readouterr().out
    assert main(["overlap", url(server)]) == 2
    assert "it is a URL; copy it to a disk" in capsys.readouterr().err
    shard.unlink()
    assert main(["verify", url(server)]) == 1
    assert "missing" in capsys.readouterr().out


def test_mistakes_in_a_url_are_one_line(data: DataSet, server: Server, tmp_path: Path):
    with pytest.raises(UserError, match="no manifest.json in it; give the URL of a data set"):
        open_corpus(config(url(server, "other"), tmp_path / "b"))
    with pytest.raises(UserError, match="gs://b/: .*bucket"):
        open_corpus(config("gs://b", tmp_path / "b"))
    held = data.folder / "heldout.held-00000.bin"
    held.write_bytes(held.read_bytes()[:-2])
    with pytest.raises(UserError, match="heldout.held-00000.bin is not as it was written"):
        open_corpus(config(url(server), tmp_path / "c"))
    assert not list((tmp_path / "c").rglob("heldout.held-00000.bin"))
    small = replace(config(data.folder, tmp_path / "b"), model=ModelConfig(vocab_size=100))
    with pytest.raises(UserError, match="heldout.held-00000.bin has"):
        open_corpus(small)
    manifest = data.folder / "manifest.json"
    evil = manifest.read_text().replace("heldout.held-00000.bin", "../evil")
    manifest.write_text(evil)
    with pytest.raises(UserError, match="file '../evil' is not in the folder itself"):
        open_corpus(config(url(server), tmp_path / "c"))
    assert not list(tmp_path.rglob("evil"))
