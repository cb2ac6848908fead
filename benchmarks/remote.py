"""`python benchmarks/remote.py`: tokens a second of the stream of a data set at a URL.

20 M tokens of bytes, from the folder itself, by file:// and by http:// from a server on this
machine, which is Python and has a core of its own if there is one; and from one that waits before
each answer, as one far away does. By the clock: a step takes its batch, and computes nothing.
"""

import argparse
import multiprocessing
import random
import tempfile
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from jaxmoe.config import Config, DataConfig, ModelConfig, SourceConfig, TrainConfig
from jaxmoe.data import feed
from jaxmoe.data.builder import Plan, build
from jaxmoe.data.heldout_sets import move_to_set
from jaxmoe.data.opened import open_corpus
from jaxmoe.data.pieces import parse_source
from jaxmoe.data.tokenizer import bytes_tokenizer

TOKENS = 65_536  # of a batch
DELAY = 0.02  # seconds


class Handler(SimpleHTTPRequestHandler):
    """Serves ranges of files, each after a delay."""

    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # an answer is one packet, where it fits

    def __init__(self, delay: float, *args: Any, **kwargs: Any) -> None:
        self.delay = delay
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        time.sleep(self.delay)
        path, wanted = Path(self.translate_path(self.path)), self.headers["Range"]
        if not path.is_file():
            self.send_error(404)
            return
        start, stop = 0, path.stat().st_size
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            start, stop = int(first), min(stop, int(last) + 1)
        with open(path, "rb") as stream:
            stream.seek(start)
            part = stream.read(stop - start)
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{path.stat().st_size}")
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_: Any) -> None:
        pass


def serve(folder: Path, delay: float, port: Any) -> None:
    handler = partial(Handler, delay, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        port.put(server.server_address[1])
        server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as name:
        folder = made(Path(name))
        print("| read from | length 1,024 | length 8,192 |\n|---|---|---|")
        for where in (str(folder), f"file://{folder}"):
            row(where.partition("//")[0].replace(str(folder), "the folder"), where, folder, steps)
        for delay in (0.0, DELAY):
            served(folder, delay, steps)


def served(folder: Path, delay: float, steps: int) -> None:
    spawn = multiprocessing.get_context("spawn")
    port = spawn.Queue()
    process = spawn.Process(target=serve, args=(folder, delay, port), daemon=True)
    process.start()
    try:
        what = f"http:, {1000 * delay:.0f} ms a request"
        row(what, f"http://127.0.0.1:{port.get()}", folder, steps)
    finally:
        process.terminate()


def row(what: str, where: str, folder: Path, steps: int) -> None:
    rates = []
    for length in (1024, 8192):
        config = Config(
            model=ModelConfig(vocab_size=264),
            data=DataConfig(
                path=where,
                sources=(SourceConfig(name="text"),),
                cache=str(folder.parent / f"cache-{time.monotonic_ns()}"),
            ),
            train=TrainConfig(steps=steps + 1, batch_size=TOKENS // length, seq_len=length),
        )
        stream = feed.open_stream(config, open_corpus(config))
        feed.read_rows(stream, config, 0, 0, config.train.batch_size)
        begin = time.perf_counter()
        for step in range(1, steps + 1):
            feed.read_rows(stream, config, step, 0, config.train.batch_size)
        rates.append(steps * TOKENS / (time.perf_counter() - begin) / 1e6)
    print(f"| {what} | {' | '.join(f'{rate:.1f}' for rate in rates)} |", flush=True)


def made(folder: Path) -> Path:
    texts, rng = folder / "texts", random.Random(0)
    texts.mkdir()
    for number in range(1000):
        (texts / f"{number}.txt").write_text(rng.randbytes(10_000).hex())
    plan = Plan(inputs=[parse_source(f"text={texts}")])
    build(plan, bytes_tokenizer(), folder / "set", folder / "cache", workers=1)
    move_to_set(folder / "set", "held", ["text"], lambda *_: None, documents=["7.txt"])
    return folder / "set"


if __name__ == "__main__":
    main()
