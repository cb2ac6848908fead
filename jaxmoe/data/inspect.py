"""python -m jaxmoe.data inspect: which documents a step of a run is made of, without running it."""

import argparse
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from rich.console import Console
from rich.table import Table

from jaxmoe.config import Config, apply_sets, from_json, load
from jaxmoe.config_check import check
from jaxmoe.curriculum import curriculum
from jaxmoe.data import feed
from jaxmoe.data.corpus import Corpus
from jaxmoe.data.damage import UNREADABLE
from jaxmoe.data.loader import Stream
from jaxmoe.data.mixture import Mixture
from jaxmoe.data.store import Source
from jaxmoe.errors import UserError
from jaxmoe.outside import group, json_object, loads

__all__ = ["add_parser", "config_of", "run", "sequences"]

EXAMPLES = """examples:
  python -m jaxmoe.data inspect runs/quickstart --step 420         its documents, by source
  python -m jaxmoe.data inspect runs/quickstart --step 420 --text --rows 2
  python -m jaxmoe.data inspect --config my_config.py --step 1 --json
  python -m jaxmoe.data inspect --position 1000 --rows 2         two sequences as text
"""


def add_parser(commands: Any, parents: Sequence[argparse.ArgumentParser], number: Any) -> None:
    """`number`: the type of natural numbers."""
    parser = commands.add_parser(
        "inspect",
        help="print what a step trains on: its documents by source, or sequences as text",
        parents=parents,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", nargs="?", metavar="RUN_DIR", help="instead of --config")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=number, help="as metrics.jsonl counts them, from 1")
    which.add_argument("--position", type=number, default=0, help="sequence of the run, from 0")
    parser.add_argument("--rows", type=number, help="sequences to print (--step: all of them)")
    parser.add_argument("--text", action="store_true", help="with --step: print the whole text")


def config_of(args: argparse.Namespace) -> Config:
    """Of the run, or of the file; checked.

    Raises:
        UserError: there is none, or it is wrong.
    """
    if getattr(args, "run_dir", None) is None:
        config = load(args.config)
    else:
        file = Path(args.run_dir) / "config.json"
        if not file.is_file():
            raise UserError(f"{args.run_dir} holds no run: there is no config.json in it")
        try:
            config = from_json(json.dumps(loads(file.read_text())["config"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{file}: not a run's config: {error}") from None
    config = apply_sets(config, args.set)
    check(config)
    return config


def run(config: Config, corpus: Corpus, args: argparse.Namespace) -> None:
    """Prints what was asked for."""
    _check_data(corpus, args.run_dir)
    stream = feed.open_stream(config, corpus)
    if args.step is None:
        rows = 1 if args.rows is None else args.rows
        found = list(sequences(config, corpus, stream, args.position, args.position + rows))
        _print_texts(found, as_json=args.json)
        _print_damage(_news(corpus), sys.stderr)
        return
    plan = curriculum(config)
    if not 1 <= args.step <= config.train.steps:
        raise UserError(f"--step {args.step}: the run has steps 1 to {config.train.steps}")
    shape, first = plan.at(args.step - 1).shape, plan.sequences(args.step - 1)
    rows = shape.batch if args.rows is None else min(args.rows, shape.batch)
    step = {
        "step": args.step,
        "tokens": plan.tokens(args.step - 1),
        "batch_size": shape.batch,
        "seq_len": shape.length,
        "sequences": list(sequences(config, corpus, stream, first, first + rows)),
    }
    step["damaged"] = _news(corpus)  # which shards the sequences came upon
    if args.json:
        print(json.dumps(step, indent=1))
    else:
        _print_step(step, whole=args.text)


def sequences(
    config: Config, corpus: Corpus, stream: Stream | Mixture, first: int, last: int
) -> Iterator[dict[str, Any]]:
    """Of each sequence first .. last of a run: its source, epoch, documents, and its text."""
    for number in range(first, last):
        name, views = _parts(config, corpus, stream, number)
        names = corpus.names.get(name)
        inputs = [view.read(begin, end) for _, view, begin, end in views]
        documents = [
            {
                "epoch": epoch,
                **_named(names, document),
                "tokens": [start, stop],
                "of": size,
                **_skipped(part[view.bounds(document)[0] - begin + start :], start, stop),
            }
            for part, (epoch, view, begin, end) in zip(inputs, views, strict=True)
            for document, start, stop, size in _documents(view, begin, end)
        ]
        text = _text(corpus, np.concatenate(inputs))
        epoch = views[0][0]
        yield {
            "position": number,
            "source": name,
            "epoch": epoch,
            "documents": documents,
            "text": text,
        }


def _parts(
    config: Config, corpus: Corpus, stream: Stream | Mixture, number: int
) -> tuple[str, list[tuple[int, Source, int, int]]]:
    """(source, [(epoch, source as that epoch reads it, first token, end)]) of a sequence."""
    if isinstance(stream, Mixture):
        sample = stream.sample(number)
        view = lambda epoch: stream.view(sample.source, epoch)  # noqa: E731
        return sample.source, [(s.epoch, view(s.epoch), *s[1:]) for s in stream.spans(sample)]
    ((name, source),) = corpus.sources.items()
    start = stream.start(number)
    return name, [(stream.epoch(number), source, start, start + config.train.seq_len)]


def _documents(view: Source, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """(document, first token in it, end in it, its tokens) of the documents in start .. stop."""
    document = max(0, view.find(start))
    while start < stop and document < view.documents:
        begin, end = view.bounds(document)
        if stop > begin:
            yield document, max(0, start - begin), min(stop, end) - begin, end - begin
        start, document = max(start, end), document + 1


def _skipped(part: np.ndarray, start: int, stop: int) -> dict[str, list[list[int]]]:
    """Which of a document's tokens start .. stop were left out, with data.damaged=skip: `part`
    begins with them. {} where none was."""
    runs = [[start + a, start + b] for lost, a, b in _runs(part[: stop - start]) if lost]
    return {"skipped": runs} if runs else {}


def _runs(tokens: np.ndarray) -> Iterator[tuple[bool, int, int]]:
    """(whether they could not be read, first, end) of stretches of tokens, in order."""
    lost = tokens == UNREADABLE
    cuts = [0, *(np.flatnonzero(lost[1:] != lost[:-1]) + 1).tolist(), len(tokens)]
    for a, b in itertools.pairwise(cuts):
        if a < b:
            yield bool(lost[a]), a, b


def _text(corpus: Corpus, tokens: np.ndarray) -> str:
    """As it was trained on, with what was left out in square brackets."""
    return "".join(
        f"[{b - a} tokens of a damaged shard, skipped]"
        if lost
        else corpus.tokenizer.decode(tokens[a:b].tolist())
        for lost, a, b in _runs(tokens)
    )


def _news(corpus: Corpus) -> list[str]:
    return corpus.guard.news() if corpus.guard else []


def _print_damage(damage: Sequence[str], file: TextIO) -> None:
    for what in damage:
        print(f"damaged: {what}; its tokens were skipped", file=file)


def _named(names: Any, document: int) -> dict[str, Any]:
    if names is None:
        return {"document": document}
    found = names[document]
    return {"document": document, "package": found.package, "name": found.name}


def _check_data(corpus: Corpus, run_dir: str | None) -> None:
    file = Path(run_dir or "") / "environment.json"
    if run_dir is None or not file.is_file():
        return
    before = group(json_object(file), "data").get("fingerprint")
    if before not in (None, corpus.fingerprint):
        raise UserError(
            f"{run_dir}: it was trained on other data ({before}) than there is now"
            f" ({corpus.fingerprint}), whose documents would be others; bring it back"
        )


def _print_texts(found: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for one in found:
        print(f"--- position {one['position']}, epoch {one['epoch']}, {one['source']}")
        print(one["text"])


def _print_step(step: Mapping[str, Any], *, whole: bool) -> None:
    found = step["sequences"]
    counts = Counter(one["source"] for one in found)
    size = f"{step['batch_size']} x {step['seq_len']} tokens"
    print(f"step {step['step']}: {size}, after {step['tokens']:,} of the run")
    _print_damage(step["damaged"], sys.stdout)
    for source, n in sorted(counts.items()):
        print(f"\n{source}: {n} sequences, {n / len(found):.1%}")
        mine = [one for one in found if one["source"] == source]
        if whole:
            _print_texts(mine, as_json=False)
        else:
            Console().print(_table(mine))


def _table(found: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("sequence", "epoch", "document", "tokens", "of", box=None)
    for one in found:
        for at, document in enumerate(one["documents"]):
            name = f"{document['document']}"
            if "name" in document:
                name += f"  {document['package']}: {document['name']}"
            for skipped in document.get("skipped", ()):
                name += f"  (skipped {skipped[0]}..{skipped[1]})"
            start, stop = document["tokens"]
            first = str(one["position"]) if not at else ""
            table.add_row(
                first, str(document["epoch"]), name, f"{start}..{stop}", f"{document['of']}"
            )
    return table
