"""`python -m jaxmoe.convert`: Hugging Face checkpoints in and out."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from jaxmoe import config as config_lib
from jaxmoe.convert import transfer
from jaxmoe.errors import UserError
from jaxmoe.model.cost import cost

EXAMPLES = """examples:
  python -m jaxmoe.convert from-hf Mixtral-8x7B-v0.1 --to mixtral
        a folder of *.safetensors, config.json and tokenizer files, as the hub has it
  python -m jaxmoe.train --config configs/mixtral.py --set checkpoint.init_from=mixtral
        trains on from there, on any mesh
  python -m jaxmoe.convert to-hf runs/quickstart --to quickstart-hf
        the newest whole checkpoint of a run; AutoModelForCausalLM.from_pretrained loads it
  python -m jaxmoe.convert to-hf mixtral --to mixtral-hf --dtype bfloat16 --json
"""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    began = time.perf_counter()
    try:
        with _bar(quiet=args.json) as bar:
            where = args.source
            if args.command == "from-hf":
                about = transfer.from_hf(args.source, args.to, bar)
                cfg = config_lib.model_from_dict(about["model"])
                kind = about["source"]["model_type"]
            else:
                hf, where = transfer.to_hf(args.source, args.to, args.dtype, bar, args.shard_bytes)
                cfg, kind = None, hf["model_type"]
    except UserError as error:
        print(f"jaxmoe.convert: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jaxmoe.convert: interrupted; nothing was written", file=sys.stderr)
        return 130
    result: dict[str, Any] = {
        "from": str(where),
        "to": str(args.to),
        "model_type": kind,
        "tensors": bar.tensors,
        "bytes": bar.total,
        "seconds": round(time.perf_counter() - began, 3),
    }
    if cfg is not None:
        result["params"] = cost(cfg, 1).params
    if args.json:
        print(json.dumps(result))
    else:
        print(
            f"{where} -> {args.to}: {kind}, {bar.tensors} tensors, {bar.total / 1e9:.3f} GB in"
            f" {result['seconds']:.1f} s"
        )
    return 0


class _bar:
    """A progress bar on a terminal, nothing elsewhere; counts for the last line."""

    def __init__(self, *, quiet: bool) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, disable=quiet or not sys.stderr.isatty())
        self._task = self._progress.add_task("", total=None)
        self.tensors = self.total = 0

    def __enter__(self) -> "_bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, name: str, done: int, total: int) -> None:
        self.tensors, self.total = self.tensors + 1, total
        self._progress.update(self._task, description=name, completed=done, total=total)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxmoe.convert",
        description="Hugging Face checkpoints in and out: Mixtral, OLMoE, Qwen3-MoE, DeepSeek-V3,"
        " gpt-oss, Llama and Qwen3. Tensors pass one at a time; nothing is computed.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="from-hf | to-hf")
    into = commands.add_parser("from-hf", help="a Hugging Face folder -> a folder of parameters")
    into.add_argument("source", type=Path, metavar="DIR", help="safetensors and config.json")
    out = commands.add_parser("to-hf", help="parameters or a run -> a Hugging Face folder")
    out.add_argument(
        "source", type=Path, metavar="CKPT", help="what from-hf wrote, a run, or one checkpoint"
    )
    out.add_argument("--dtype", choices=transfer.DTYPES, help="default: as stored")
    out.add_argument(
        "--shard-bytes",
        type=_positive,
        default=transfer.SHARD,
        metavar="N",
        help="of a file at most",
    )
    for command in (into, out):
        command.add_argument("--to", type=Path, required=True, metavar="DIR", help="is created")
        command.add_argument("--json", action="store_true", help="one line of JSON, no bar")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


if __name__ == "__main__":
    sys.exit(main())
