"""Constants, and operations element by element."""

from __future__ import annotations

from torch import Tensor

from hf_prune.structure.rules.call import ONE, RULES, Call, rule
from hf_prune.structure.tracing import Origin, Traced
from hf_prune.structure.unify import (
    Atom,
    Term,
)

UNIFORM_FACTORIES = {
    "zeros",
    "ones",
    "full",
    "empty",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "scalar_tensor",
}


def factory(call: Call) -> None:
    """A constant made from nothing."""
    for tensor in call.outputs:
        call.tracer.fresh(tensor, call.origin)


for _name in ("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided", "empty_like", "one_hot"):
    RULES[_name] = lambda call: factory(_as_constant(call))


def _as_constant(call: Call) -> Call:
    call.origin = Origin(constant=True, varying=call.name == "one_hot")
    return call


@rule("zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "bernoulli")
def filled_like(call: Call) -> None:
    """A uniform constant with the layouts of another tensor."""
    traced = call[call.inputs[0]]
    call.origin = Origin(constant=traced.origin.constant, varying=False)
    call.give(list(traced.terms))


def broadcast(call: Call) -> None:
    """Aligned dimensions are one; entries of size 1 stretch."""
    shape = call.outputs[0].shape
    terms: list[Term] = []
    for back in range(len(shape), 0, -1):
        size = shape[-back]
        found = [call[t].terms[-back] for t in call.inputs if t.dim() >= back and t.shape[-back] == size]
        if size == 1 or not found:
            terms.append(ONE if size == 1 else Atom(size))
            continue
        for other in found[1:]:
            call.unify(found[0], other)
        terms.append(found[0])
    parameters = [call[t] for t in call.inputs if call[t].parameter is not None]
    others = [t for t in call.inputs if call[t].parameter is None]
    scaled = len(parameters) == 1 and all(call[t].origin.constant for t in others)
    for position in range(len(call.outputs)):
        call.give(list(terms), position)
        if scaled and not call.name.endswith("_"):  # a parameter cast, scaled or shifted is still that parameter
            call.tracer.known[id(call.outputs[position])].parameter = parameters[0].parameter


for _name in ("masked_fill", "floor_divide", "polar", "uniform", "normal", "exponential"):  # not tagged as pointwise
    RULES[_name] = RULES[_name + "_"] = broadcast


@rule("log_sigmoid_forward")
def log_sigmoid(call: Call) -> None:
    """Same layouts; the second output is a work space."""
    call.give(list(call[call.inputs[0]].terms))


@rule("copy")
def copy(call: Call) -> None:
    """Write `src` into `self`, stretched."""
    target, source = call.args[0], call.args[1]
    if isinstance(source, Tensor):
        for back in range(1, source.dim() + 1):
            if source.shape[-back] == target.shape[-back]:
                call.unify(call[target].terms[-back], call[source].terms[-back])


@rule(
    "clone", "detach", "alias", "lift_fresh", "lift_fresh_copy", "lift", "contiguous", "_to_copy", "to", "tril", "triu"
)
def identity(call: Call) -> None:
    """Same layouts."""
    traced = call[call.inputs[0]]
    shares = call.name in ("detach", "alias", "lift_fresh", "lift", "contiguous")
    copied = Traced([], call.origin, traced.parameter, traced.chooses)
    call.give(list(traced.terms), like=traced if shares else copied)


@rule("cumsum", "cumprod", "logcumsumexp")
def cumulative(call: Call) -> None:
    """A running sum mixes its dimension and leaves the others alone."""
    traced = call[call.inputs[0]]
    call.mix(traced.terms[call.arg(1, 0)])
    call.give(list(traced.terms))
