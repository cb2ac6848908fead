"""All meshes that divide, with what varies beside them; those that fit, the fastest first."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from jaxmoe.config import Config, MeshConfig, replace
from jaxmoe.config_check import check
from jaxmoe.curriculum import curriculum
from jaxmoe.errors import UserError
from jaxmoe.plan.answer import Answer, plan
from jaxmoe.plan.forecast import step_time
from jaxmoe.plan.hardware import Hardware
from jaxmoe.plan.memory import state_bytes
from jaxmoe.plan.stages import mean_over, pinned, stages

SHOWN = 10
# Traced at most, fastest first: a trace takes a second or more.
TRACED = 40
Progress = Callable[[int, int], None]  # done, of how many


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search gives.

    Attributes:
        best: those that fit, by predicted step time.
        tried: candidates that divide.
        too_large: of those, that do not fit: by their state alone, or when traced.
        left: not traced, since enough faster ones fit.
    """

    best: tuple[Answer, ...]
    tried: int
    too_large: int
    left: int


def search(
    config: Config,
    n_devices: int,
    chip: Hardware,
    efficiency: float,
    *,
    progress: Progress = lambda *_: None,
    traced: int = TRACED,
) -> Found:
    """`progress` is told after each candidate.

    Raises:
        UserError: a rule between fields that no mesh can keep.
    """
    check(replace(config, mesh=MeshConfig(context=config.mesh.context)))
    candidates = [
        (c, size) for c in variants(config, n_devices) if (size := _least(c, n_devices)) is not None
    ]
    timed, too_large = [], 0
    for number, (candidate, size) in enumerate(candidates, start=1):
        progress(number, len(candidates) + traced)
        if size > chip.hbm:
            too_large += 1
            continue
        timed.append((_seconds(candidate, n_devices, chip, efficiency), number, candidate))
    best: list[Answer] = []
    looked_at = 0
    for _, _, candidate in sorted(timed, key=lambda found: found[:2])[:traced]:
        if len(best) == SHOWN:
            break
        looked_at += 1
        progress(len(candidates) + looked_at, len(candidates) + traced)
        answer = plan(candidate, n_devices, chip, efficiency=efficiency)
        if answer.fits:
            best.append(answer)
        else:
            too_large += 1
    progress(len(candidates) + traced, len(candidates) + traced)
    return Found(
        best=tuple(sorted(best, key=lambda a: a.run.seconds_a_step)),
        tried=len(candidates),
        too_large=too_large,
        left=len(timed) - looked_at,
    )


def variants(config: Config, n_devices: int) -> Iterator[Config]:
    """Every mesh of that many devices over replica, stage, data, expert and model, with 2, 4 and
    8 microbatches a stage, and both rematerialisations. `context` and `rounds` stay."""
    rest = n_devices // config.mesh.context
    if n_devices % config.mesh.context:
        return
    m = config.model
    for model, expert, stage in _triples(rest, m.n_heads, 1 if m.is_dense else m.n_experts):
        left = rest // (model * expert * stage)
        for replica in _divisors(left):
            mesh = MeshConfig(
                replica=replica,
                stage=stage,
                data=left // replica,
                context=config.mesh.context,
                expert=expert,
                model=model,
                rounds=config.mesh.rounds if stage > 1 else 1,
            )
            for count in (2 * stage, 4 * stage, 8 * stage) if stage > 1 else (0,):
                for remat in ("full", "none"):
                    yield replace(
                        config,
                        model=replace(m, remat=remat),
                        mesh=replace(mesh, microbatches=count),
                    )


def _triples(n: int, heads: int, experts: int) -> Iterator[tuple[int, int, int]]:
    for model in _divisors(math.gcd(n, heads)):
        for expert in _divisors(math.gcd(n // model, experts)):
            for stage in _divisors(n // model // expert):
                yield model, expert, stage


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def _seconds(config: Config, n_devices: int, chip: Hardware, efficiency: float) -> float:
    """Of a step, the mean of the run, without what activations move through HBM."""
    parts = stages(config)
    found = {
        shape: step_time(pinned(config, shape), n_devices, chip, None, efficiency)[0].seconds
        for shape in dict.fromkeys(part.shape for part in parts)
    }
    return mean_over(parts, found)


def _least(config: Config, n_devices: int) -> int | None:
    """Bytes that a device needs at least; None where something does not divide."""
    ways = n_devices // (config.mesh.model * config.mesh.context)
    shapes = curriculum(config).shapes
    if any(shape.batch % (ways * shape.accumulate) for shape in shapes):  # the cheapest rule first
        return None
    try:
        check(config)
        parameters, moments = state_bytes(config, n_devices)
    except UserError:
        return None
    return 2 * parameters + moments  # gradients are as large as parameters
