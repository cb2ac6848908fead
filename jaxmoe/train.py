"""`python -m jaxmoe.train`: trains a model and forecasts its final held-out loss."""

import argparse
import os
import platform as python_platform
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax

import jaxmoe
from jaxmoe import config as config_lib
from jaxmoe import exits
from jaxmoe import mesh as mesh_lib
from jaxmoe.config import Config
from jaxmoe.config_check import check
from jaxmoe.curriculum import curriculum
from jaxmoe.data import feed
from jaxmoe.data.cache import cache_root
from jaxmoe.data.corpus import HeldOut
from jaxmoe.data.opened import open_corpus
from jaxmoe.errors import UserError
from jaxmoe.forecast import register
from jaxmoe.forecast.score import score
from jaxmoe.model.cost import cost
from jaxmoe.model.lm import lm_specs
from jaxmoe.optim import rates
from jaxmoe.outside import needed
from jaxmoe.run import platform, record, viewers, xla
from jaxmoe.run.bring import bring
from jaxmoe.run.dashboard import display
from jaxmoe.run.goodput import GOODPUT, Ledger, account, age
from jaxmoe.run.health import Corrupted
from jaxmoe.run.loop import Alarmed, Outcome, Trainer
from jaxmoe.run.params import open_params
from jaxmoe.run.preemption import Preempted
from jaxmoe.run.progress import Display, clock
from jaxmoe.run.state import param_specs

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "configs" / "quickstart.py"
REPORT = "report.html"

EXAMPLES = """examples:
  python -m jaxmoe.train                                  the quickstart: minutes on two CPU cores
  python -m jaxmoe.train --set train.steps=300            the same, shorter
  python -m jaxmoe.train --set mesh.expert=4 --set mesh.model=2 --run-dir runs/sharded
                                                          on 8 emulated CPU devices
  python -m jaxmoe.train --set data.path=my_texts --set "data.holdout=()" --run-dir runs/mine
                                                          on a folder of your own text files
"""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        config = config_lib.apply_sets(config_lib.load(str(args.config)), args.set)
        return run(config, record.run_dir(args.run_dir, config), args.resume)
    except UserError as error:
        return _leave(exits.MISTAKE, str(error))
    except Alarmed as alarm:
        return _leave(exits.ALARM, f"{alarm}; the same command goes on from here")
    except Preempted as asked:
        return _leave(exits.REQUEUE, f"{asked}; the same command goes on from here")
    except Corrupted as found:
        return _leave(exits.CORRUPTION, f"{found}; the same command goes on from before")
    except KeyboardInterrupt:
        return _leave(exits.INTERRUPTED, "interrupted; the same command goes on from here")
    except Exception:
        return _leave(exits.FAULT)


def run(config: Config, run_dir: Path, resume: str) -> int:
    """Builds everything, trains, and leaves the record; nothing is written before it is checked."""
    began, ledger = time.perf_counter(), Ledger(age())
    check(config)
    viewers.check(config.log)
    record.check_directory(run_dir, config, resume)
    platform.start(config)
    bring(config, run_dir, resume, partial(print, "mirror:", flush=True))
    xla.keep_compiled(cache_root(config.data))
    mesh = mesh_lib.build(config.mesh)
    mesh_lib.shardings(param_specs(config), mesh)
    for shape in curriculum(config).shapes:
        mesh_lib.check_batch(mesh, "train.batch_size", shape.batch, shape.accumulate)
    mesh_lib.check_batch(mesh, "eval.batch_size", config.eval.batch_size)
    origin = None
    if config.checkpoint.init_from is not None and not record.checkpoint_steps(run_dir):
        origin = open_params(Path(config.checkpoint.init_from))
        origin.check(lm_specs(config.model))
    writes = jax.process_index() == 0
    if (result := record.finished(run_dir)) is not None:
        if writes:
            _say_finished(result, run_dir)
        return 0
    corpus = open_corpus(config, _reporter(writes and config.log.terminal != "quiet"))
    record.check_data(run_dir, corpus.fingerprint)
    # Outside of the mesh: it is measured on one device.
    peak = platform.measured_peak(config.model.dtype)
    view = display(config.log.terminal, config.name, writes=writes)
    try:
        with jax.set_mesh(mesh):
            trainer = Trainer(config, mesh, corpus, run_dir, view, peak, origin, ledger=ledger)
            with trainer.health.watching():
                state = trainer.prepare()
                _describe(config, trainer, peak, view)
                outcome = trainer.run(state)
    finally:
        view.close()
        ledger.line()
    if writes:
        _summary(outcome, trainer.sets[0].held_out, run_dir, time.perf_counter() - began)
        ledger.line()  # the page took its time, too
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxmoe.train",
        description="Trains a mixture-of-experts language model and forecasts its final loss.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        default=QUICKSTART,
        metavar="FILE[:FUNCTION]",
        help="default: configs/quickstart.py",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one config value"
    )
    parser.add_argument("--run-dir", metavar="DIR", help="default: runs/NAME, by the config's name")
    parser.add_argument(
        "--resume",
        choices=("auto", "never", "must"),
        default="auto",
        help="auto (default): go on with the run in the directory if there is one",
    )
    return parser


def _leave(code: int, why: str | None = None) -> int:
    """Says why in one line (None: the traceback), and ends a process of several at once: JAX's
    shutdown barrier hangs when a peer is gone. Nobody may be there to read it any more."""
    with suppress(OSError):
        if why is None:
            traceback.print_exc()
        else:
            print(f"jaxmoe.train: {why}", file=sys.stderr)
    if jax.distributed.is_initialized():
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)
    return code


def _reporter(writes: bool) -> Callable[[str, float], None]:
    """A progress line for the parts of data preparation that take time."""
    shown: set[str] = set()

    def report(phase: str, fraction: float) -> None:
        if writes and phase not in shown and phase != "list":
            shown.add(phase)
            print(f"data: {phase} ...", flush=True)

    return report


def _describe(config: Config, trainer: Trainer, peak: float, view: Display) -> None:
    """What this run is, to the record and to the person."""
    corpus, counted = trainer.corpus, cost(config.model, config.train.seq_len)
    held_out = trainer.sets[0].held_out
    trainer.record.text(record.TOKENIZER, corpus.tokenizer.json)
    trainer.record.write(
        record.SCHEDULE,
        {
            "lr": rates(config).tolist(),
            **_tokens(config),
        },
    )
    trainer.record.write(
        record.ENVIRONMENT,
        {
            "jaxmoe": jaxmoe.__version__,
            "code": platform.code_version(),
            "jax": jax.__version__,
            "python": python_platform.python_version(),
            "devices": platform.describe_devices(),
            "mesh": dict(trainer.mesh.shape),
            "peak_flops": peak,
            "params": counted.params,
            "params_active": counted.params_active,
            "flops_per_token": counted.flops_per_token,
            "data": {
                "fingerprint": corpus.fingerprint,
                "train_tokens": feed.tokens(corpus),
                "mix": {name: used._asdict() for name, used in feed.used(trainer.stream).items()},
                "skipped_files": dict(corpus.manifest.get("skipped", {})),
                "heldout": held_out.name,
                "heldout_bytes": held_out.bytes,
                "heldout_fingerprint": held_out.fingerprint,
                "sets": {s.held_out.name: s.held_out.fingerprint for s in trainer.sets},
                "xz_bits_per_byte": held_out.xz_bits_per_byte,
            },
        },
    )
    sizes = f"{counted.params / 1e6:.2f} M parameters, {counted.params_active / 1e6:.2f} M active"
    view.note(
        f"{config.name}: {sizes}; {platform.describe_devices()},"
        f" mesh {mesh_lib.describe(trainer.mesh.shape)};"
        f" matmul peak {peak / 1e9:.0f} GFLOP/s"
    )
    skipped = corpus.manifest.get("skipped", {})
    if config.data.path is not None and skipped:
        counts = ", ".join(f"{n} {reason}" for reason, n in skipped.items())
        view.note(f"files skipped in {config.data.path}: {counts}")
    for name, used in feed.used(trainer.stream).items():
        skipped_tokens = f"; {used.skipped:,} left out" if used.skipped else ""
        view.note(
            f"{name}: {used.tokens:,} tokens, {used.epochs:.2f} times its {used.epoch:,}"
            f"{skipped_tokens}"
        )
    view.note(
        f"training text {feed.tokens(corpus) / 1e6:.2f} M tokens; held out {held_out.name},"
        f" {held_out.bytes / 1e3:.0f} kB (xz -9: {held_out.xz_bits_per_byte:.3f} bits per byte)"
    )


def _tokens(config: Config) -> dict[str, Any]:
    """For the schedule's file: of a step where all have as many, or else up to each step's end."""
    plan = curriculum(config)
    if len({shape.tokens for shape in plan.shapes}) == 1:
        return {"tokens_per_step": plan.largest}
    return {"tokens": plan.by_step().tolist()}


def _say_finished(result: dict[str, Any], run_dir: Path) -> None:
    from jaxmoe.report.page import write

    needed(result, {"nll": float, "bits_per_byte": float}, run_dir / record.EVALS)
    print(
        f"{run_dir} is finished: held-out {result['bits_per_byte']:.4f} bits per byte"
        f" ({result['nll']:.4f} nats per token) at step {result['step']}; nothing is left to do"
    )
    if not (run_dir / REPORT).exists():  # a kill came between the last step and the page
        write(run_dir)
    print(f"report: {run_dir / REPORT}")


def _summary(outcome: Outcome, held_out: HeldOut, run_dir: Path, seconds: float) -> None:
    """The result, every forecast against it, and the page."""
    xz = held_out.xz_bits_per_byte
    print(
        f"done in {clock(seconds)}: held-out {outcome.bits_per_byte:.4f} bits per byte"
        f" ({outcome.nll:.4f} nats per token; xz -9 of the same bytes: {xz:.4f})"
    )
    if (spent := account(record.read_lines(run_dir / GOODPUT))) is not None:
        print(spent.sentence())
    _print_scores(run_dir / record.FORECASTS, outcome.bits_per_byte / outcome.nll)
    try:
        from jaxmoe.report.page import write  # plotly: not everywhere that trains can draw
    except ModuleNotFoundError as error:
        print(
            f"report: not written, {error.name} is missing; run python -m jaxmoe.report elsewhere"
        )
    else:
        print(f"report: {write(run_dir)}")


def _print_scores(file: Path, unit: float) -> None:
    """Each registered forecast against the outcome; `unit`: bits per byte of one nat per token."""
    if not file.exists():
        return
    records = register.read(file)
    for line, one in zip(records, score(records), strict=False):
        low, high = line["loss"]["q05"] * unit, line["loss"]["q95"] * unit
        print(
            f"forecast at {one.seen:4.0%} of the run: {one.median * unit:.4f}"
            f" [{low:.4f}, {high:.4f}], off by {one.error:+.2%},"
            f" {'inside' if one.inside90 else 'OUTSIDE'} its 90 % interval"
        )


if __name__ == "__main__":
    sys.exit(main())
