"""Adafactor's update (Shazeer and Stern, arXiv:1804.04235), by the logical axes of a parameter.

optax factors over the two largest dims, which may enumerate layers or experts, and leaves heads
apart; here each matrix of a stack is factored into its inputs and its outputs, as `Spec` has them.
On a plain matrix both give the same.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmoe.spec import Spec, is_spec

Array = jax.Array

DECAY = 0.8  # section 7.2: beta2 of update t is 1 - t^-0.8
THRESHOLD = 1.0  # section 6: of an update's root mean square
TINY = 1e-30  # section 3: added to the squares


class Moment(NamedTuple):
    """Second moments of one parameter, float32; sums' dims stay, with size 1."""

    rows: Any  # mean over the outputs; None where it is not factored
    columns: Any  # mean over the inputs
    whole: Any  # None where it is factored


class AdafactorState(NamedTuple):
    count: Array  # int32 []: updates done
    moments: Any  # a Moment for each parameter


def scale_by_adafactor(specs: Any) -> optax.GradientTransformation:
    """Gradients over their factored root mean square (algorithm 4), clipped by each matrix's own
    (algorithm 6). No first moment, and no scaling by the parameter: the rate is the schedule's.

    Sums over sharded dims are over all devices, so the result does not depend on the mesh, and the
    moments are sharded over those dims of their parameter that they have.
    """

    def init(params: Any) -> AdafactorState:
        zeros = jax.tree.map(_zeros, specs, params, is_leaf=is_spec)
        return AdafactorState(count=jnp.zeros([], jnp.int32), moments=zeros)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        count: Any = optax.safe_increment(state.count)
        beta = 1 - count.astype(jnp.float32) ** -DECAY

        def one(spec: Spec, grad: Array, moment: Moment) -> tuple[Array, Moment]:
            return _update(spec, grad, moment, beta)

        both = jax.tree.map(one, specs, updates, state.moments, is_leaf=is_spec)
        updates, moments = (
            jax.tree.map(lambda _, pair, i=i: pair[i], specs, both, is_leaf=is_spec) for i in (0, 1)
        )
        return updates, AdafactorState(count=count, moments=moments)

    return optax.GradientTransformation(init, update)


def _dims(spec: Spec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Input and output dims of the matrices of a stack; a vector has no outputs."""
    own = spec.own_dims
    if "vocab" in spec.axes and not spec.inputs:  # an embedding
        return own[:1], own[1:]
    ins = tuple(i for i in own if spec.axes[i] in spec.inputs)
    return (ins, tuple(i for i in own if i not in ins)) if ins else (own, ())


def _zeros(spec: Spec, param: Array) -> Moment:
    ins, outs = _dims(spec)
    zeros = jnp.zeros_like(param)
    if not outs:
        return Moment(rows=None, columns=None, whole=zeros)
    return Moment(rows=_mean(zeros, outs), columns=_mean(zeros, ins), whole=None)


def _update(spec: Spec, grad: Array, old: Moment, beta: Array) -> tuple[Array, Moment]:
    ins, outs = _dims(spec)
    squares = grad * grad + TINY

    def moved(moment: Array, now: Array) -> Array:
        return beta * moment + (1 - beta) * now

    if outs:
        rows, columns = (
            moved(old.rows, _mean(squares, outs)),
            moved(old.columns, _mean(squares, ins)),
        )
        new = Moment(rows=rows, columns=columns, whole=None)
        update = grad * jax.lax.rsqrt(rows / _mean(rows, ins)) * jax.lax.rsqrt(columns)
    else:
        new = Moment(rows=None, columns=None, whole=moved(old.whole, squares))
        update = grad * jax.lax.rsqrt(new.whole)
    size = jnp.sqrt(_mean(update * update, ins + outs))
    return update / jnp.maximum(1, size / THRESHOLD), new


def _mean(x: Array, dims: tuple[int, ...]) -> Array:
    return x.mean(dims, keepdims=True)
