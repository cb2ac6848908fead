"""Renders a run as one self-contained HTML file: no network, no other file, nothing to install."""

import base64
import hashlib
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

import jaxmoe
from jaxmoe.report import experts, health, loss, spent, words
from jaxmoe.report.plot import Figure
from jaxmoe.report.records import Row, Run, group, number, read
from jaxmoe.report.scores import Score, score

__all__ = ["filled", "render", "replaced", "summary", "write"]

HERE = Path(__file__).parent
EVENTS = 500  # rows of the table; a long run checkpoints more often than anyone reads


def write(run_dir: Path, out: Path | None = None, ladders: Sequence[Path] = ()) -> Path:
    """Writes RUN/report.html, or `out`, and returns where. `ladders`: whose fit is to be shown.

    Raises:
        UserError: there is no such run, it has no metrics yet, or its record is damaged.
    """
    return replaced(out or run_dir / "report.html", render(read(run_dir), ladders))


def replaced(out: Path, page: str) -> Path:
    # Renamed into place: a browser that reloads during the write sees the old page, not half.
    part = out.with_name(f".{out.name}.part")
    part.write_text(page, encoding="utf-8", errors="backslashreplace")  # JSON has "\ud800"
    part.replace(out)
    return out


def render(run: Run, ladders: Sequence[Path] = ()) -> str:
    scores = score(run)
    figures = [
        loss.losses(run, scores),
        loss.narrowing(run, scores),
        health.optimiser(run),
        experts.load(run),
        health.speed(run),
        spent.goodput([(run.name, run)]),
    ]
    if ladders:
        from jaxmoe.report.rungs import fitted  # fits: seconds, and only where it is asked for

        figures.append(fitted(ladders, [run]))
    return filled(
        "page.html.j2",
        figures,
        run=run,
        status=_status(run),
        lead=_lead(run, scores),
        facts=_facts(run),
        scores=scores,
        events=_events(run),
        event_counts=_counts(run),
        settings=_grouped(run.config, "run"),
        surroundings=_grouped(run.environment, "machine"),
    )


def filled(template: str, figures: Sequence[Figure], **values: Any) -> str:
    """A template with its figures, and all that makes it one file."""
    plotly, script = get_plotlyjs(), _source("page.js")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["tied"] = words.tied
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment.get_template(template).render(
        words=words,
        version=jaxmoe.__version__,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        figures={figure.id: figure for figure in figures},
        data={figure.id: _plotted(figure) for figure in figures if figure.traces},
        style=_source("page.css"),
        plotly=plotly,
        script=script,
        hashes=" ".join(map(_hash, (plotly, script))),
        **values,
    )


def summary(run: Run) -> dict[str, Any]:
    """The headline for scripts. Losses are in nats per token."""
    last = run.heldout[-1] if run.heldout else {}
    return {
        "name": run.name,
        "fingerprint": run.fingerprint,
        "step": run.step,
        "tokens": number(run.last, "tokens"),
        "heldout_nll": number(last, "nll"),
        "bits_per_byte": number(last, "bits_per_byte"),
        "outcome": run.outcome,
        "time": None if run.spent is None else run.spent.summary(),
        "forecasts": [
            {
                "cutoff_step": one.forecast.cutoff_step,
                "law": one.forecast.law,
                "median": one.forecast.loss.median,
                "q05": one.forecast.loss.q05,
                "q95": one.forecast.loss.q95,
                "error": one.error,
                "inside_50": one.inside_50,
                "inside_90": one.inside_90,
            }
            for one in score(run)
        ],
    }


def _source(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """A script's name in the page's policy: a script from anywhere else does not run."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _plotted(figure: Figure) -> dict[str, Any]:
    return {"traces": figure.traces, "layout": figure.layout, **figure.extra}


def _status(run: Run) -> str:
    done = any(row.get("what") == "done" for row in run.events)
    at = f"step {words.step(run.step)}"
    if run.target_step:
        at += f" of {words.step(run.target_step)}"
    if done or run.outcome is not None:
        return f"Finished at {at}"
    share = run.step / run.target_step if run.target_step else None
    return f"At {at}" + ("" if share is None else f", {words.percent(share)} of the run")


def _lead(run: Run, scores: list[Score]) -> str:
    """The one thing that the page has to say."""
    if not scores:
        return "No forecast of the final loss is registered yet."
    first, last = scores[0], scores[-1]
    if run.outcome is None or first.error is None:
        return (
            f"The latest forecast, at step {words.step(last.forecast.cutoff_step)}, expects "
            f"a final held-out loss of {last.forecast.loss.median:.3f} nats/token, "
            f"with 90 % odds between {last.forecast.loss.q05:.3f} and {last.forecast.loss.q95:.3f}."
        )
    inside = "inside" if first.inside_90 else "outside"
    when = f"After {words.percent(first.share)} of the run" if first.share else "Before its start"
    return (
        f"{when} the forecast of the final held-out loss "
        f"was {first.forecast.loss.median:.3f} nats/token. It came out at {run.outcome:.3f}: "
        f"the forecast was {words.side(first.error)}, "
        f"and the outcome lies {inside} its 90 % interval."
    )


def _facts(run: Run) -> list[tuple[str, str, str]]:
    """(what, value, note) of the headline."""
    last = run.heldout[-1] if run.heldout else {}
    nll = number(last, "nll") if run.outcome is None else run.outcome
    bits = number(last, "bits_per_byte")
    label = "Final held-out loss" if run.outcome is not None else "Held-out loss"
    note = f"{words.fixed(nll)} nats/token" if nll is not None else "not evaluated yet"
    facts = [(label, words.fixed(bits), f"bits per byte; {note}")]
    xz = number(group(run.environment, "data"), "xz_bits_per_byte")
    if xz is not None:
        facts.append(("xz -9, for comparison", words.fixed(xz), _against_xz(bits, xz)))
    facts += _forecast_fact(run)
    tokens, flops = number(run.last, "tokens"), number(run.last, "flops")
    cost = f"{words.big(flops, 'FLOP')} of compute" if flops else "trained on"
    facts.append(("Tokens", words.big(tokens), cost))
    total, active = (number(run.environment, key) for key in ("params", "params_active"))
    if total:
        facts.append(("Parameters", words.big(total), f"{words.big(active)} active for a token"))
    if run.spent is not None and run.spent.seconds:
        note = f"in productive steps, of {words.seconds(run.spent.seconds)}"
        facts.append(("Goodput", words.percent(run.spent.goodput), note))
    return facts


def _against_xz(bits: float | None, xz: float) -> str:
    if not bits:
        return "bits per byte"
    relation = "fewer" if bits <= xz else "more"
    return f"bits per byte; the model needs {words.percent(abs(1 - bits / xz))} {relation}"


def _forecast_fact(run: Run) -> list[tuple[str, str, str]]:
    scores = score(run)
    if not scores:
        return []
    one = scores[0] if run.outcome is not None else scores[-1]
    said = one.forecast.loss
    if one.error is not None:
        note = f"of the first forecast, {words.fixed(said.median)} nats/token"
        return [("Forecast error", f"{100 * one.error:+.2f} %", note)]
    note = f"nats/token; 90 %: {words.fixed(said.q05)} to {words.fixed(said.q95)}"
    return [("Forecast of the end", words.fixed(said.median), note)]


def _events(run: Run) -> list[dict[str, Any]]:
    rows = [
        {
            "time": words.when(row.get("time")),
            "step": words.step(number(row, "step")),
            "what": str(row.get("what", "")),
            "why": str(row.get("why") or ""),
            "loud": row.get("what") in loss.LOUD,
        }
        for row in run.events
    ]
    if len(rows) <= EVENTS:
        return rows
    # What is left out is routine: the loud ones always stay.
    quiet = [i for i, row in enumerate(rows) if not row["loud"]]
    dropped = set(quiet[: len(rows) - EVENTS])
    return [row for i, row in enumerate(rows) if i not in dropped]


def _counts(run: Run) -> str:
    counts = Counter(str(row.get("what", "other")) for row in run.events)
    said = [words.plural(count, what) for what, count in counts.most_common()]
    left = len(run.events) - len(_events(run))
    cut = f" The table leaves out {left} routine ones." if left else ""
    return f"{', '.join(said)}.{cut}" if said else "No event is recorded."


def _grouped(tree: Row, loose_name: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """(group, its flattened settings), the loose ones first."""
    loose = {key: value for key, value in tree.items() if not isinstance(value, dict)}
    groups = {key: value for key, value in tree.items() if isinstance(value, dict)}
    named = [(loose_name, words.flat(loose))] if loose else []
    return named + [(name, words.flat(part)) for name, part in groups.items()]
