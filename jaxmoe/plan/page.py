"""The answer as a page for people."""

from collections.abc import Sequence

from rich.console import Console, Group
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from jaxmoe import mesh as mesh_lib
from jaxmoe.plan.answer import Answer
from jaxmoe.plan.forecast import Run
from jaxmoe.plan.search import Found


def show(answer: Answer, console: Console) -> None:
    stages = (_stages(answer),) if answer.stages else ()
    console.print(Group(_model(answer), *stages))
    console.print(Group(_memory(answer), _traffic(answer), _time(answer), _money(answer)))


def show_found(found: Found, console: Console) -> None:
    head = ("mesh", "microbatches", "remat", "step", "MFU", "memory", "bound by", "bubble", "days")
    table = Table(*head, title="meshes that fit, fastest first", box=None, pad_edge=False)
    for answer in found.best:
        table.add_row(
            mesh_text(answer),
            str(answer.microbatches),
            answer.config.model.remat,
            seconds(answer.run.seconds_a_step),
            f"{answer.run.mfu:.1%}",
            f"{answer.memory.peak / answer.available:.0%}",
            answer.step.bound,
            f"{answer.step.bubble:.0%}",
            f"{answer.run.days:,.1f}",
        )
    console.print(table if found.best else "no mesh fits")
    console.print(
        f"{found.tried:,} layouts divide, {found.too_large:,} of them are too large"
        + (f"; {found.left:,} slower ones were not looked at" if found.left else "")
    )


def mesh_text(answer: Answer) -> str:
    rounds = answer.config.mesh.rounds
    return mesh_lib.describe(answer.sizes) + (f", {rounds} rounds" if rounds > 1 else "")


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.1f} ms"


def amount(value: float) -> str:
    """Bytes, in powers of a thousand."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if value >= size:
            return f"{value / size:,.2f} {unit}"
    return f"{value / 1e3:,.2f} kB"


def _section(title: str, rows: Sequence[tuple[str, str]], *more: Table | Text) -> Group:
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in rows:
        table.add_row(name, value)
    return Group(Rule(title, align="left"), table, *more)


def _counted(params: int) -> str:
    """'46,700,000,000 (46.7 billion)', and small ones alone."""
    return f"{params:,} ({params / 1e9:,.1f} billion)" if params >= 10**8 else f"{params:,}"


def _model(answer: Answer) -> Group:
    c, config, shape = answer.counted, answer.config, answer.shape
    chips = f"{answer.devices:,} x {answer.chip.name}"
    return _section(
        "model",
        [
            ("config", f"{config.name} on {chips}: {mesh_text(answer)}"),
            ("parameters", _counted(c.params)),
            ("active a token", _counted(c.params_active)),
            ("FLOPs a token", f"{c.flops_per_token:.4g} with attention, no recomputation"),
            (
                "a step",
                f"{shape.batch:,} sequences of {shape.length:,}:"
                f" {shape.tokens:,} tokens, remat={config.model.remat}",
            ),
        ],
    )


def _stages(answer: Answer) -> Group:
    """Batch and length of each, whether it fits, and its part of the run."""
    head = ("from step", "tokens", "batch x length", "parts", "memory", "")
    more = ("step", "MFU", "FLOPs", "days", "price")
    table = Table(*head, *more, box=None, pad_edge=False)
    for stage, found in answer.stages:
        run, shape, used = found.run, stage.shape, found.memory.peak / found.available
        table.add_row(
            f"{stage.step:,}",
            f"{stage.tokens:.4g}",
            f"{shape.batch:,} x {shape.length:,}",
            str(shape.accumulate),
            amount(found.memory.peak),
            Text(f"{used:.0%}", style="" if found.fits else "bold red"),
            seconds(run.seconds_a_step),
            f"{run.mfu:.1%}",
            f"{run.flops:.3g}",
            f"{run.days:,.2f}",
            f"${run.dollars:,.0f}",
        )
    shape = answer.shape
    largest = f"{shape.batch:,} x {shape.length:,} needs the most memory: model to step are its"
    return Group(Rule("stages of the ramp", align="left"), table, Text(largest))


def _memory(answer: Answer) -> Group:
    m = answer.memory
    rows = [
        ("parameters", m.parameters),
        ("optimiser state", m.moments),
        ("gradients", m.gradients),
        ("kept for the backward pass", m.kept),
        ("working buffers", m.working),
        ("batch", m.batch),
        ("peak", m.peak),
        ("of", round(answer.available)),
    ]
    largest = Table("largest buffers at the peak", "shape", "made by", box=None, pad_edge=False)
    for held in m.largest:
        shape = f"{held.dtype}[{','.join(map(str, held.shape))}]"
        largest.add_row(amount(held.size), shape, held.primitive)
    verdict = Text(answer.verdict, style="bold" if answer.fits else "bold red")
    title = "memory of a device"
    return _section(title, [(name, amount(size)) for name, size in rows], verdict, largest)


def _traffic(answer: Answer) -> Group:
    table = Table(
        *("sent by a device in a step", "along", "bytes", "over", "at", "takes", ""),
        box=None,
        pad_edge=False,
    )
    for flow in sorted(answer.flows, key=lambda f: -f.seconds):
        table.add_row(
            flow.kind,
            " x ".join(flow.axes),
            amount(flow.sent),
            flow.link,
            f"{amount(flow.bandwidth)}/s",
            seconds(flow.seconds),
            "beside compute" if flow.hidden else "at the end" if flow.last else "waited for",
        )
    return Group(Rule("traffic", align="left"), table if answer.flows else Text("none: one device"))


def _time(answer: Answer) -> Group:
    s = answer.step
    return _section(
        "time of a step, by a roofline",
        [
            (
                "compute",
                f"{seconds(s.compute)} at {answer.efficiency:.0%} of the peak, with"
                f" {s.recomputed:.0%} computed twice",
            ),
            ("memory", seconds(s.memory)),
            ("traffic beside them", seconds(s.hidden)),
            ("traffic waited for", seconds(s.open)),
            ("traffic at the end", seconds(s.last)),
            ("bubble of the pipeline", f"{s.bubble:.1%}"),
            ("update", seconds(s.update)),
            ("step", f"{seconds(s.seconds)}, bound by {s.bound}"),
        ],
    )


def _money(answer: Answer) -> Group:
    table = Table("the run", "by the roofline", box=None, pad_edge=False)
    runs = [answer.run]
    if answer.asked is not None:
        table.add_column("at the MFU given")
        runs.append(answer.asked)
    for name, values in _lines(runs).items():
        table.add_row(name, *values)
    return Group(Rule("time and money", align="left"), table)


def _lines(runs: list[Run]) -> dict[str, list[str]]:
    energy = ["not known" if r.kwh is None else f"{r.kwh / 1e3:,.1f} MWh" for r in runs]
    return {
        "MFU": [f"{r.mfu:.1%}" for r in runs],
        "tokens a second": [f"{r.tokens_a_second:,.0f}" for r in runs],
        "tokens": [f"{r.tokens:,}" for r in runs],
        "FLOPs (6 x active x tokens)": [f"{r.flops:.3g} ({r.flops_6nd:.3g})" for r in runs],
        "days": [f"{r.days:,.2f}" for r in runs],
        "chip-hours": [f"{r.chip_hours:,.0f}" for r in runs],
        "energy, at most": energy,
        "price": [f"${r.dollars:,.0f}" for r in runs],
    }
