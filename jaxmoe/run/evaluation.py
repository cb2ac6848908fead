"""Held-out losses by set and by domain."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmoe.config import Config
from jaxmoe.data import holdout
from jaxmoe.data.corpus import Corpus, HeldOut
from jaxmoe.data.heldout_sets import part
from jaxmoe.data.loader import Rows, heldout_batches
from jaxmoe.errors import UserError

__all__ = ["EvalSet", "evaluate_sets", "open_sets"]

Sums = tuple[float, float]  # nats, and tokens that they are of
LossOf = Callable[[Sequence[Rows]], Sums]


@dataclass(frozen=True, kw_only=True, eq=False)
class EvalSet:
    """A held-out set that may be evaluated in a run: it was compared with the training text."""

    held_out: HeldOut
    train_fingerprint: str  # of that training text
    leaking: int  # documents of it that repeat the set, found and left in
    # By domain its batches, and bits per byte for one nat per token. One named "" is the whole set.
    batches: Mapping[str, tuple[list[Rows], float]]

    @property
    def bits_per_nat(self) -> float:
        """Bits per byte of the set for one nat per token."""
        return _bits(len(self.held_out.tokens) - 1, self.held_out.bytes)


def open_sets(config: Config, corpus: Corpus) -> tuple[EvalSet, ...]:
    """The sets of `eval.sets`; the first is what is forecast.

    Raises:
        UserError: no set of such a name, or one that was not compared with this training text.
    """
    known = {held_out.name: held_out for held_out in (corpus.heldout, *corpus.others)}
    for name in config.eval.sets:
        if name not in known:
            raise UserError(f"eval.sets: no held-out set {name!r}; there is {', '.join(known)}")
    names = dict.fromkeys(config.eval.sets or known)
    return tuple(_open(config, corpus, known[name]) for name in names)


def evaluate_sets(sets: Sequence[EvalSet], loss_of: LossOf) -> list[dict[str, Any]]:
    """A line of evals.jsonl for each, without step and tokens.

    nll: nats per token over the whole set; bits_per_byte: of its text. The same under `domains`,
    where a set has several.
    """
    return [_line(one, loss_of) for one in sets]


def _open(config: Config, corpus: Corpus, whole: HeldOut) -> EvalSet:
    leaking = holdout.checked(corpus.manifest, whole.fingerprint, corpus.fingerprint)
    held_out = part(whole, config.eval.tokens) if config.eval.tokens else whole
    length, size = config.train.seq_len, config.eval.batch_size
    texts = {"": (held_out.tokens, held_out.bytes)}
    if len(held_out.domains) > 1:
        texts = {d: (t.tokens, int(t.sizes.sum())) for d, t in held_out.domains.items()}
    return EvalSet(
        held_out=held_out,
        train_fingerprint=corpus.fingerprint,
        leaking=leaking,
        batches={
            domain: (heldout_batches(tokens, length, size), _bits(len(tokens) - 1, bytes))
            for domain, (tokens, bytes) in texts.items()
        },
    )


def _bits(tokens: int, bytes: int) -> float:
    return tokens / bytes / math.log(2)


def _line(one: EvalSet, loss_of: LossOf) -> dict[str, Any]:
    sums = {domain: loss_of(batches) for domain, (batches, _) in one.batches.items()}
    nats, tokens = (sum(s[n] for s in sums.values()) for n in (0, 1))
    nll = float(np.float64(nats) / np.float64(tokens))
    line = {
        "set": one.held_out.name,
        "set_fingerprint": one.held_out.fingerprint,
        "nll": nll,
        "bits_per_byte": nll * one.bits_per_nat,
    }
    if len(sums) > 1:
        line["domains"] = {
            domain: {"nll": s[0] / s[1], "bits_per_byte": s[0] / s[1] * one.batches[domain][1]}
            for domain, s in sums.items()
        }
    return line
