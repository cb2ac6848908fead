"""`python -m jaxmoe.ladder add`: a run that was trained elsewhere becomes a record of a ladder."""

import argparse
import json
from pathlib import Path

from jaxmoe.errors import UserError
from jaxmoe.ladder import records
from jaxmoe.ladder.family import recipe
from jaxmoe.ladder.reading import check_recipe, open_ladder
from jaxmoe.run import record

__all__ = ["command"]


def command(args: argparse.Namespace) -> int:
    ladder = open_ladder(args.ladder)
    run: Path = args.run
    config = record.read_config(run)
    if record.finished(run) is None:
        raise UserError(f"{run} is not finished: its last loss is not that of its schedule's end")
    check_recipe(ladder, config)
    first = ladder.rows[0]
    varies = tuple(recipe(config).keys() - first["recipe"].keys())
    place = {"family": first["family"], "rung": args.rung, "seed": config.seed, "branch_of": None}
    row = records.make(run.parent, run, place, varies)
    folder = args.out or (args.ladder.parent if args.ladder.is_file() else args.ladder)
    folder.mkdir(parents=True, exist_ok=True)
    known = records.read_records(folder) if (folder / records.RECORDS).exists() else []
    if any(records.key(one) == records.key(row) for one in known):
        raise UserError(f"{folder}: rung {args.rung}, seed {config.seed} is recorded there already")
    records.append(folder, row)
    if args.json:
        print(json.dumps(row))
    else:
        print(
            f"{folder / records.RECORDS}: rung {row['rung']}, seed {row['seed']},"
            f" {row['flops']:.3g} FLOPs, loss {row['loss']:.4f}"
        )
    return 0
