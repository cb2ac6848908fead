"""What a forecast must know of a run before it starts, counted from its config and its data.

Ladder records and targets are counted by the same functions, so that they can be compared.
"""

from typing import Any

from jaxmoe import config as config_lib
from jaxmoe.config import Config
from jaxmoe.curriculum import curriculum
from jaxmoe.data import feed
from jaxmoe.data.cache import Corpus
from jaxmoe.forecast.curve import Schedule
from jaxmoe.forecast.ladder import Target
from jaxmoe.model.cost import cost
from jaxmoe.optim import rates
from jaxmoe.run.evaluation import open_sets
from jaxmoe.run.record import run_fingerprint

__all__ = [
    "flops",
    "identity_of",
    "numbers_of",
    "rates_of",
    "router_of",
    "schedule_of",
    "sizes_of",
    "target_of",
]

RATES = ("lr", "schedule", "warmup_steps", "decay_fraction", "final_lr", "batch_rule")


def numbers_of(config: Config, corpus: Corpus) -> dict[str, Any]:
    """The columns of `forecast.points`. unique_tokens: those that are read at least once."""
    sizes = sizes_of(config)
    used = feed.used(feed.open_stream(config, corpus)).values()
    unique = sum(min(one.tokens, one.epoch) for one in used)
    return {
        **sizes,
        "unique_tokens": unique if used else min(sizes["tokens"], feed.tokens(corpus)),
    }


def sizes_of(config: Config) -> dict[str, Any]:
    """Those columns that the config alone tells.

    params_active: as cost.py counts them. params_total: with the experts that a token does not go
    through, and like those without the embedding's rows, which are looked up. flops: model FLOPs of
    the whole run, at the length of each stretch.
    """
    model, steps = config.model, config.train.steps
    counted = cost(model, config.train.seq_len)
    looked_up = 0 if model.tie_embeddings else counted.groups["embed"]
    return {
        "params_active": counted.params_active,
        "params_total": counted.params_main - looked_up,
        "tokens": curriculum(config).tokens(steps),
        "flops": flops(config, steps),
        "experts": model.n_experts,
        "top_k": model.top_k,
        "router": router_of(config),
    }


def flops(config: Config, steps: int) -> float:
    """Of the model (model/cost.py), in float64: the first `steps` steps of a run."""
    total = 0.0
    for stretch in curriculum(config).stretches:
        done = min(max(0, steps - stretch.step), stretch.steps)
        counted = cost(config.model, stretch.shape.length)
        total += float(done * stretch.shape.batch) * counted.flops_per_sequence
    return total


def router_of(config: Config) -> str:
    """A name that is the same for routers that choose alike; "" for a dense model, which has
    none."""
    if config.model.is_dense:
        return ""
    router = config.model.router
    words = [router.score]
    if router.balance_bias_rate is not None:
        words.append("balance bias")
    if router.n_groups > 1:
        words.append(f"{router.top_k_groups} of {router.n_groups} groups")
    return ", ".join(words)


def identity_of(config: Config, corpus: Corpus) -> dict[str, Any]:
    """What the losses are of: the first held-out set, the training text, the tokenizer.

    Raises:
        UserError: the set was not compared with the training text.
    """
    first = open_sets(config, corpus)[0]
    return {
        "set": first.held_out.name,
        "set_fingerprint": first.held_out.fingerprint,
        "train_fingerprint": first.train_fingerprint,
        "tokenizer_fingerprint": corpus.tokenizer.fingerprint,
        "leaking": first.leaking,
    }


def schedule_of(config: Config) -> Schedule:
    """Rates and tokens of every step."""
    return Schedule(lr=rates(config), tokens=curriculum(config).by_step())


def rates_of(config: Config) -> dict[str, Any]:
    """The parameters of the learning rate's schedule, for a reader of the register."""
    return {key: getattr(config.optim, key) for key in RATES}


def target_of(config: Config, corpus: Corpus, *, recipe_fingerprint: str | None = None) -> Target:
    """A planned run. `recipe_fingerprint`: of its ladder's recipe, where that is known."""
    steps, every = config.train.steps, config.eval.every
    return Target(
        name=config.name,
        config=config_lib.fingerprint(config),
        run=run_fingerprint(config),
        numbers=numbers_of(config, corpus),
        identity=identity_of(config, corpus),
        schedule=schedule_of(config),
        rates=rates_of(config),
        eval_steps=tuple(sorted({*range(every, steps + 1, every), steps})),
        recipe_fingerprint=recipe_fingerprint,
    )
