"""Operations that sum over a dimension: products, reductions, norms, attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_prune.structure.rules.call import ONE, Call, note_role, rule
from hf_prune.structure.rules.elementwise import broadcast
from hf_prune.structure.unify import (
    Atom,
    Cat,
    Term,
    fix,
    leaves,
    resolve,
    split_product,
)

if TYPE_CHECKING:
    from torch import Tensor

    from hf_prune.structure.tracing import Traced


def contract(
    call: Call, a: Traced, b: Traced, pairs: list[tuple[Term, Term]], kept_a: list[Term], kept_b: list[Term]
) -> None:
    """Sum of products over the dimensions `pairs`."""
    tracer, call.origin.weighs = call.tracer, None
    for left, right in pairs:
        call.unify(left, right)
        if a.parameter is None and b.parameter is None:
            call.mix(left)
            for weights, kept in ((a.origin.weighs, kept_b), (b.origin.weighs, kept_a)):
                if weights is not None and set(leaves(weights)) & set(leaves(left)):
                    for atom in leaves(kept[-1]):
                        atom.attended = True
    note_role(tracer.consumed, a, [left for left, _ in pairs])
    note_role(tracer.consumed, b, [right for _, right in pairs])
    note_role(tracer.produced, a, kept_a)
    note_role(tracer.produced, b, kept_b)


@rule("mm", "addmm", "mv", "dot", "_addmm_activation")
def mm(call: Call) -> None:
    """`[n, k] @ [k, m]`, plus a bias."""
    left, right = call.args[-2:] if "addmm" not in call.name else call.args[1:3]
    a, b = call[left], call[right]
    contract(call, a, b, [(a.terms[-1], b.terms[0])], a.terms[:-1], b.terms[1:])
    terms = [*a.terms[:-1], *b.terms[1:]]
    if "addmm" in call.name:
        _add(call, call.args[0], terms)
    call.give(terms)


@rule("bmm", "baddbmm")
def bmm(call: Call) -> None:
    """`[b, n, k] @ [b, k, m]`, plus an addend."""
    left, right = call.args[-2:] if call.name == "bmm" else call.args[1:3]
    a, b = call[left], call[right]
    call.unify(a.terms[0], b.terms[0])
    contract(call, a, b, [(a.terms[2], b.terms[1])], [a.terms[0], a.terms[1]], [b.terms[0], b.terms[2]])
    terms = [a.terms[0], a.terms[1], b.terms[2]]
    if call.name.startswith("baddbmm"):
        _add(call, call.args[0], terms)
    call.give(terms)


def _add(call: Call, addend: Tensor, terms: list[Term]) -> None:
    for back in range(1, addend.dim() + 1):
        if addend.shape[-back] != 1:
            call.unify(call[addend].terms[-back], terms[-back])


@rule("linalg_solve_triangular")
def solve(call: Call) -> None:
    """`A x = b` for batches of square `A`: mixes the rows, leaves batch and columns alone."""
    a, b = call[call.args[0]], call[call.args[1]]
    for left, right in zip(a.terms[:-1], b.terms[:-1], strict=True):
        call.unify(left, right)
    for term in (a.terms[-1], b.terms[-2]):
        call.mix(term)
        call.fix(term)
    call.give(list(b.terms))


@rule("_grouped_mm")
def grouped_mm(call: Call) -> None:
    """`[t, k] @ [experts, k, m]`, the rows of each expert with its matrix."""
    left, right = call.inputs[0], call.inputs[1]
    a, b = call[left], call[right]
    if left.dim() != 2 or right.dim() != 3:
        raise NotImplementedError
    fix(b.terms[0], "experts: chosen by index")
    contract(call, a, b, [(a.terms[1], b.terms[1])], a.terms[:1], [b.terms[2]])
    call.give([a.terms[0], b.terms[2]])


@rule("convolution")
def convolution(call: Call) -> None:
    """A 1-d or 2-d convolution, within groups of channels; depthwise: one filter per channel."""
    source, weight, bias = call.args[:3]
    x, w, groups, transposed = call[source], call[weight], call.args[8], call.args[6]
    if transposed:
        raise NotImplementedError
    of_input, inside = split_product(x.terms[1], groups)
    of_weight, made = split_product(w.terms[0], groups)
    call.unify(of_input, of_weight)
    if weight.shape[1] > 1 or groups == 1:
        contract(call, x, w, [(inside, w.terms[1])], [x.terms[0], of_input], [of_weight, made])
    if bias is not None:
        call.unify(call[bias].terms[0], w.terms[0])
    sizes = call.outputs[0].shape[2:]
    lengths = [t if t.size == size else Atom(size) for t, size in zip(x.terms[2:], sizes, strict=True)]
    call.give([x.terms[0], w.terms[0], *lengths])


@rule(
    "sum",
    "mean",
    "var",
    "std",
    "var_mean",
    "std_mean",
    "prod",
    "amax",
    "amin",
    "max",
    "min",
    "any",
    "all",
    "_is_all_true",
    "argmax",
    "argmin",
    "count_nonzero",
    "aminmax",
    "median",
)
def reduction(call: Call) -> None:
    """Mixes the reduced dimensions; indices of maxima name their entries."""
    _reduce(call, call.arg(1, call.kwargs.get("dim")))
    if call.name == "max" and len(call.outputs) == 2 and not call[call.inputs[0]].origin.constant:
        call.chosen(call[call.inputs[0]].terms[call.arg(1, call.kwargs.get("dim"))], 1, 1)


@rule("kthvalue", "mode")
def order_statistic(call: Call) -> None:
    """Mixes the dimension of whose entries it takes one."""
    _reduce(call, call.arg(2 if call.name == "kthvalue" else 1, -1))


@rule("linalg_vector_norm", "norm")
def norm(call: Call) -> None:
    """A norm mixes the reduced dimensions."""
    _reduce(call, call.arg(2, call.kwargs.get("dim")))


def _reduce(call: Call, dims: Any) -> None:
    source = call.inputs[0]
    traced = call[source]
    if len(call.inputs) > 1:
        return broadcast(call)  # max(a, b)
    every = list(range(source.dim()))
    if isinstance(dims, bool) or dims is None or (isinstance(dims, (list, tuple)) and not dims):
        reduced = every
    else:
        reduced = [d % source.dim() for d in (dims if isinstance(dims, (list, tuple)) else [dims])] if every else []
    for d in reduced:
        call.mix(traced.terms[d])
    for position, output in enumerate(call.outputs):
        same_rank = output.dim() == source.dim()
        call.give(
            [ONE if d in reduced else t for d, t in enumerate(traced.terms) if same_rank or d not in reduced], position
        )
    return None


@rule("_softmax", "softmax", "_log_softmax", "_safe_softmax")
def softmax(call: Call) -> None:
    """Mixes one dimension; of four-dimensional scores the others are computed independently: attention heads."""
    source = call.inputs[0]
    traced = call[source]
    dim = call.args[1] % source.dim()
    call.mix(traced.terms[dim])
    if _mark_heads(call, dim):
        call.origin.weighs = traced.terms[dim]
    call.give(list(traced.terms))


@rule("logsumexp")
def denominator(call: Call) -> None:
    """Of a softmax that is written out: reduces one dimension; the others are computed independently."""
    dims = call.arg(1, call.kwargs.get("dim"))
    _reduce(call, dims)
    if isinstance(dims, (list, tuple)) and len(dims) == 1:
        _mark_heads(call, dims[0] % call.inputs[0].dim())


def _mark_heads(call: Call, dim: int) -> bool:
    """Mark the dimensions but `dim` of what a softmax reads as attention heads, if it may be attention."""
    traced = call[call.inputs[0]]
    if len(traced.terms) < 3 or traced.origin.constant:
        return False
    for d, term in enumerate(traced.terms):
        if d != dim:
            for atom in leaves(term):
                atom.heads = True
            if isinstance(whole := resolve(term), Cat) and all(part.size == 1 for part in whole.parts):
                call.tracer.apart[call.tracer.where] = whole.size
    return True


@rule("native_layer_norm", "_fused_rms_norm", "native_group_norm", "native_batch_norm")
def normalise(call: Call) -> None:
    """Mixes the normalised dimensions, scales them by weight and bias."""
    source = call.inputs[0]
    traced = call[source]
    if call.name == "native_batch_norm":
        raise NotImplementedError
    grouped = call.name == "native_group_norm"
    dims = [1] if grouped else list(range(source.dim() - len(call.args[1]), source.dim()))
    for d in dims:
        call.mix(traced.terms[d])
    for parameter in call.inputs[1:]:
        for term, d in zip(call[parameter].terms, dims, strict=True):
            call.unify(traced.terms[d], term)
    call.give(list(traced.terms))
