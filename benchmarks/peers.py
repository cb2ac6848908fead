"""Our train step beside those of other libraries: the same shape, the same batches, in turns.

    python benchmarks/peers.py                                  ours and transformers, two shapes
    python benchmarks/peers.py --maxtext ~/mt/bin/python        and MaxText, from its environment
    python benchmarks/peers.py --shapes moe8 --turns 9 --json   one line of JSON
    python benchmarks/peers.py --launch                         seconds to the first trained step

Every library has a process of its own, which waits while another one works, and gets the same real
text in the same order; all have AdamW, clipping and the load-balancing loss, in float32. A ratio
is of a library's median step to ours in the same turn; the table has the median over the turns and
their range. CPU seconds (user and system, all threads) bear other work on the machine better than
wall seconds do. Of a library's own ways through the experts the one with the fewest CPU seconds is
measured; the others are listed below the table.

transformers is the extra `parity` (pip install -e '.[parity]'). MaxText wants an environment of its
own with Python 3.12 (pip install 'maxtext[tpu]==0.2.5'; its plain package has no dependencies).
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import step
from launched import launch

from jaxmoe.config import Config
from jaxmoe.data.cache import prepare
from jaxmoe.data.loader import Stream

WORKER = Path(__file__).with_name("peers_worker.py")
SHAPES = ("moe8", "moe64", "moe128")  # of step.py: those that all libraries can have alike
TRIAL = 2  # steps that ways of one library are compared on, after one that is not counted
IDLE = 0.5  # CPU seconds a process may use while it waits for its turn before we say so


@dataclass(frozen=True)
class Peer:
    """A library as it is measured; `ways` are tried, and the fastest stays."""

    name: str
    library: str  # of peers_worker.py
    python: str
    ways: tuple[str, ...]
    drops: bool = False
    routed: bool = (
        True  # its time depends on where tokens go, so that its router has to learn first
    )


@dataclass
class Worker:
    """A peer's process."""

    peer: Peer
    way: str
    process: subprocess.Popen[str]
    log: Path
    launch_seconds: float = 0.0  # from the start of its process to the end of its first step
    turns: list[list[dict[str, float]]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def ask(self, steps: int, *, keep: bool = False) -> list[dict[str, float]]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        found = self.answer()
        if keep:
            self.turns.append(found)
        return found

    def answer(self) -> list[dict[str, float]]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            last = self.log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
            raise SystemExit(
                f"peers.py: {self.peer.name} ({self.way}) ended with {code}: {last[0][:300]}"
            )
        self.facts = json.loads(line)
        if self.facts["idle_cpu"] > IDLE:
            say(f"{self.peer.name} used {self.facts['idle_cpu']:.2f} CPU s while it waited")
        return self.facts["steps"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def say(text: str) -> None:
    print(f"peers: {text}", file=sys.stderr, flush=True)


def weight_copies(config: Config) -> float:
    """Bytes of an implementation that copies its experts' matrices to every token that uses them,
    as transformers' batched_mm does, of all layers: they are kept for the backward pass."""
    model = config.model
    pairs = config.tokens_per_step * model.top_k
    return 4.0 * pairs * 3 * model.d_model * model.d_ff * model.n_layers


def peers(args: argparse.Namespace) -> list[Peer]:
    """Raises SystemExit, in one line, where one is asked for that is not installed."""
    missing = [m for m in ("torch", "transformers") if importlib.util.find_spec(m) is None]
    if missing and not args.no_transformers:
        raise SystemExit(
            f"peers.py: {' and '.join(missing)} not installed: pip install -e '.[parity]', or leave"
            " it out with --no-transformers"
        )
    # As for the others: what the backward pass needs is kept as far as it pays (model.remat).
    found = [Peer("jaxmoe", "jaxmoe", sys.executable, ("matmuls",))]
    if not args.no_transformers:
        ways = ("eager", "grouped_mm", *(["grouped_mm+compile"] if args.compile else []))
        found.append(Peer("transformers", "transformers", sys.executable, ways))
    if args.maxtext:
        probe = [args.maxtext, "-c", "import importlib.metadata as m; m.version('maxtext')"]
        try:
            subprocess.run(probe, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            raise SystemExit(f"peers.py: --maxtext {args.maxtext}: no maxtext there") from None
        # Without recomputation, as far as it goes: 2.35 CPU seconds, 2.56 with its default (moe8).
        ways = tuple(f"{way}+minimal_with_context" for way in ("ragged", "dense"))
        dropping = ("capacity+minimal_with_context",)
        both = {"library": "maxtext", "python": args.maxtext, "routed": False}
        found.append(Peer("maxtext", ways=ways, **both))
        found.append(Peer("maxtext dropping", ways=dropping, drops=True, **both))
    return [replace(p, ways=among(p.ways, args.ways)) for p in found]


def among(ways: tuple[str, ...], wanted: Sequence[str]) -> tuple[str, ...]:
    """Those that are wanted, by their part before the `+`; all where none of them is."""
    return tuple(way for way in ways if way.split("+")[0] in wanted) or ways


def spec(config: Config, way: str, folder: Path, threads: int) -> dict[str, Any]:
    """What a worker is told, without a type of ours."""
    model, optim = config.model, config.optim
    shape = ("vocab_size", "d_model", "d_ff", "n_layers", "n_heads", "n_kv_heads", "d_head")
    rates = ("lr", "warmup_steps", "beta1", "beta2", "eps", "weight_decay", "clip")
    return {
        "shape": config.name,
        "variant": way,
        "folder": str(folder),
        "batches": str(folder / "batches.npy"),
        "threads": threads,
        "max_steps": config.train.steps,
        "seq_len": config.train.seq_len,
        "batch_size": config.train.batch_size,
        "model": {key: getattr(model, key) for key in (*shape, "n_experts", "top_k")}
        | {"load_balance_coef": model.router.load_balance_coef},
        "optim": {key: getattr(optim, key) for key in rates},
    }


@contextmanager
def started(peer: Peer, way: str, config: Config, folder: Path) -> Iterator[Worker]:
    """A worker that has done its first step."""
    name = f"{config.name}-{peer.name}-{way}".replace(" ", "-")
    file, log = folder / f"{name}.json", folder / f"{name}.log"
    threads = len(os.sched_getaffinity(0))
    file.write_text(json.dumps(spec(config, way, folder, threads)))
    # All are measured on CPU, and no JAX is to look for chips first.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    # OpenMP's threads (torch's) spin where they wait: a step's 1.7 CPU seconds were 5.6 to 8.6, its
    # 3.4 wall seconds 12 to 18, while others had the cores (moe8; 2 cores, a load of 4 to 8).
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    begin = time.perf_counter()
    with log.open("w") as errors:
        process = subprocess.Popen(
            [peer.python, str(WORKER), peer.library, str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
    worker = Worker(peer, way, process, log)
    try:
        worker.answer()
        worker.ask(1)
        worker.launch_seconds = time.perf_counter() - begin
        yield worker
    finally:
        worker.close()


def cpu_of(one: dict[str, float]) -> float:
    return one["user"] + one["system"]


def fastest(peer: Peer, config: Config, folder: Path) -> tuple[str, dict[str, float]]:
    """Of a library's ways, and the CPU seconds a step of each; none is tried where there is one."""
    if len(peer.ways) == 1:
        return peer.ways[0], {}
    tried = {}
    for way in peer.ways:
        say(f"{config.name}: trying {peer.name}, {way}")
        with started(peer, way, config, folder) as worker:
            tried[way] = statistics.median(map(cpu_of, worker.ask(TRIAL)))
    return min(tried, key=lambda way: tried[way]), tried


def measure(config: Config, chosen: list[Peer], args: argparse.Namespace) -> dict[str, Any]:
    """One shape: every peer warmed up, then all in turns."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peers-")))
        write_batches(config, folder / "batches.npy", args.warm + args.turns * args.steps + 1)
        workers, tried = [], {}
        for peer in chosen:
            way, tried[peer.name] = fastest(peer, config, folder)
            warm = args.warm if peer.routed else TRIAL
            say(f"{config.name}: {peer.name} ({way}) starts, then {warm} steps to warm up")
            workers.append(stack.enter_context(started(peer, way, config, folder)))
            workers[-1].ask(warm)
        for turn in range(args.turns):
            for worker in workers:
                name = f"{config.name}: turn {turn + 1} of {args.turns}, {worker.peer.name}"
                cpu = statistics.median(map(cpu_of, worker.ask(args.steps, keep=True)))
                say(f"{name}: {cpu:.2f} CPU s a step")
        rows = [row(worker, config, tried[worker.peer.name]) for worker in workers]
    return {
        "shape": config.name,
        "rows": with_ratios(rows),
        "batched_mm_gib": weight_copies(config) / 2**30,
        "load_average": os.getloadavg(),
        "threads": len(os.sched_getaffinity(0)),
    }


def write_batches(config: Config, file: Path, count: int) -> None:
    corpus = prepare(config.data, config.model.vocab_size, lambda *_: None)
    stream = Stream(corpus.train, config.train.seq_len, config.seed)
    size = config.train.batch_size
    np.save(file, np.stack([stream.rows(i * size, 0, size) for i in range(count)]))


def row(worker: Worker, config: Config, tried: dict[str, float]) -> dict[str, Any]:
    wall = [statistics.median(s["wall"] for s in turn) for turn in worker.turns]
    cpu = [statistics.median(map(cpu_of, turn)) for turn in worker.turns]
    return {
        "name": worker.peer.name,
        "way": worker.way,
        "wall_turns": wall,
        "cpu_turns": cpu,
        "wall_seconds": statistics.median(wall),
        "cpu_seconds": statistics.median(cpu),
        "tokens_per_second": config.tokens_per_step / statistics.median(wall),
        "drops": worker.peer.drops,
        "params": worker.facts["params"],
        "loss": worker.facts.get("loss"),
        "load_max": worker.facts.get("load_max"),
        "version": worker.facts["version"],
        "launch_seconds": worker.launch_seconds,
        "tried_cpu_seconds": tried,
    }


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds each row's time over the first row's, turn by turn: the median, the least, the most."""
    for one in rows:
        for what in ("wall", "cpu"):
            ours = rows[0][f"{what}_turns"]
            ratios = [a / b for a, b in zip(one[f"{what}_turns"], ours, strict=True)]
            one[f"{what}_ratio"] = (statistics.median(ratios), min(ratios), max(ratios))
    return rows


def table(result: dict[str, Any], config: Config) -> str:
    model, rows = config.model, result["rows"]
    lines = [
        f"{config.name}: width {model.d_model}, {model.n_layers} layers, {model.n_experts} experts,"
        f" top-{model.top_k}, expert width {model.d_ff}, vocabulary {model.vocab_size:,}, batch"
        f" {config.train.batch_size} x {config.train.seq_len}, float32, {result['threads']} cores;"
        f" load of the machine {result['load_average'][0]:.1f}",
        "                   wall s  CPU s  tokens/s  drops      params"
        "   wall / ours       CPU / ours",
    ]
    for r in rows:
        ratios = "  ".join("{:5.2f} ({:.2f}-{:.2f})".format(*r[f"{k}_ratio"]) for k in TIMES)
        lines.append(
            f"{r['name']:17} {r['wall_seconds']:7.2f} {r['cpu_seconds']:6.2f}"
            f" {r['tokens_per_second']:9,.0f}  {'yes' if r['drops'] else 'no':5}"
            f" {r['params']:11,}  {ratios}"
        )
    for r in rows:
        others = ", ".join(f"{way} {cpu:.2f}" for way, cpu in r["tried_cpu_seconds"].items())
        lines.append(
            f"  {r['name']}: {r['version']}; {r['way']}"
            + (f"; CPU s of each way tried: {others}" if others else "")
            + (f"; most loaded expert {r['load_max']:.2f} times its share" if r["load_max"] else "")
            + (f"; loss {r['loss']:.2f}" if r["loss"] else "")
        )
    if any(r["name"] == "transformers" for r in rows):
        lines.append(
            "  transformers' batched_mm is left out: it copies matrices to tokens, about"
            f" {result['batched_mm_gib']:.0f} GiB of them here"
        )
    if len({r["params"] for r in rows}) > 1:
        lines.append("  THE SHAPES DIFFER: not the same number of parameters")
    return "\n".join(lines)


TIMES = ("wall", "cpu")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES[:2])
    parser.add_argument("--no-transformers", action="store_true", help="leaves it out")
    parser.add_argument("--maxtext", metavar="PYTHON", help="an interpreter that has MaxText")
    parser.add_argument("--compile", action="store_true", help="tries torch.compile too: minutes")
    parser.add_argument(
        "--ways", nargs="+", default=(), metavar="WAY", help="tries only these, such as dense"
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="of each library in each turn")
    parser.add_argument("--warm", type=int, default=30, help="before: the router learns")
    parser.add_argument("--launch", action="store_true", help="times `python -m jaxmoe.train`")
    parser.add_argument("--json", action="store_true", help="one line a shape")
    args = parser.parse_args(argv)
    if args.launch:
        launch(say, as_json=args.json)
        return
    if min(args.turns, args.steps, args.warm) < 1:
        parser.error("--turns, --steps and --warm are at least 1")
    chosen = peers(args)
    for name in args.shapes:
        config = step.shapes()[name]
        result = measure(config, chosen, args)
        print(json.dumps(result) if args.json else table(result, config) + "\n", flush=True)


if __name__ == "__main__":
    main()
