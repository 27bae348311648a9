"""Operations that look entries up by index, or order them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_prune.structure.forward import TOKEN
from hf_prune.structure.rules.call import ONE, Call, note_role, rule
from hf_prune.structure.rules.views import run
from hf_prune.structure.tracing import Traced
from hf_prune.structure.unify import (
    Atom,
    Term,
    fix,
)

if TYPE_CHECKING:
    from torch import Tensor

LOOK_UPS = frozenset(
    (
        *("index_select", "index", "_unsafe_index", "gather", "scatter", "scatter_add", "index_add", "index_copy"),
        *("scatter_reduce", "index_put", "_index_put_impl", "index_fill"),
    )
)
"""Operations whose integers name entries of a dimension."""


@rule("embedding")
def embedding(call: Call) -> None:
    """Rows of a table: tokens, or other entries, none of which can go."""
    weight, ids = call.args[0], call.args[1]
    table, known = call[weight], call.tracer.values.get(ids)
    if table.parameter is not None and known is not None and bool((known == TOKEN).all()):
        call.tracer.token_tables.add(table.parameter)
    else:
        fix(table.terms[0], "looked up by index")
    note_role(call.tracer.produced, table, [table.terms[1]])
    call.give([*call[ids].terms, table.terms[1]])


@rule("nonzero")
def nonzero(call: Call) -> None:
    """Places of true entries, one per row."""
    call.give(
        [Atom(call.outputs[0].shape[0]), ONE if call.outputs[0].shape[1] == 1 else call.fixed(call.inputs[0].dim())]
    )


@rule("index_select", "index", "_unsafe_index")
def index(call: Call) -> None:
    """Entries by index: the indexed dimensions are what the index chooses from, or fixed; the others stay."""
    source = call.args[0]
    traced = call[source]
    if call.name.startswith("index_select"):
        dim = call.args[1] % source.dim()
        indexed: dict[int, Tensor] = {dim: call.args[2]}
    else:
        indexed = {d: i for d, i in enumerate(call.args[1]) if i is not None}
    if any(i.dtype.is_floating_point or i.dtype.itemsize == 1 for i in indexed.values()):
        raise NotImplementedError
    d, only = next(iter(indexed.items()))
    if len(indexed) == 1 and (picked := _constant_run(call.tracer.values.get(only))) is not None:
        start, end = picked
        call.give(
            [run(call, t, start % t.size, (end - 1) % t.size + 1) if i == d else t for i, t in enumerate(traced.terms)]
        )
        return
    for d, ids in indexed.items():
        _look_up(call, traced.terms[d], ids)
    rank = max(i.dim() for i in indexed.values())
    found: list[Term] = []
    for back in range(rank, 0, -1):
        terms = [call[i].terms[-back] for i in indexed.values() if i.dim() >= back and i.shape[-back] != 1]
        for other in terms[1:]:
            call.unify(terms[0], other)
        found.append(terms[0] if terms else ONE)
    dims = sorted(indexed)
    adjacent = dims == list(range(dims[0], dims[-1] + 1))
    kept: list[Term] = []
    for d in range(source.dim()):
        if d == (dims[0] if adjacent else 0):
            kept.extend(found)
        if d not in indexed:
            kept.append(traced.terms[d])
    call.give(kept, like=Traced([], call.origin, traced.parameter))


def _look_up(call: Call, term: Term, ids: Tensor) -> None:
    """Entries are looked up: the dimension is the one that top-k chose `ids` from; by other ids it is fixed."""
    if (chooses := call[ids].chooses) is None:
        call.fix(term)
    else:
        call.unify(term, chooses)


def _constant_run(known: Tensor | None) -> tuple[int, int] | None:
    """Start and end if an index is a known list of successive entries (`x[..., [-2], :]`)."""
    if known is None or known.dim() != 1 or known.numel() == 0:
        return None
    values = known.tolist()
    wraps = values[0] < 0 <= values[-1]  # `[-1, 0]`
    return None if wraps or values != list(range(values[0], values[-1] + 1)) else (values[0], values[-1] + 1)


@rule(
    "gather",
    "scatter",
    "scatter_add",
    "index_add",
    "index_copy",
    "scatter_reduce",
    "index_put",
    "_index_put_impl",
    "index_fill",
)
def scatter(call: Call) -> None:
    """Entries moved along one dimension by index; the other dimensions agree where they have one size."""
    source = call.args[0]
    traced = call[source]
    if "index_put" in call.name:
        dims = [d for d, i in enumerate(call.args[1]) if i is not None]
        values = call.args[2]
    else:
        dims, values = [call.args[1] % source.dim()], call.inputs[-1]
    for d in dims:
        _look_up(call, traced.terms[d], call.args[1][d] if "index_put" in call.name else call.args[2])
    tensors = [values] if "index_put" in call.name else call.inputs[1:]
    for other in tensors:
        for back in range(1, min(source.dim(), other.dim()) + 1):
            if source.dim() - back not in dims and other.shape[-back] == source.shape[-back] != 1:
                call.unify(traced.terms[-back], call[other].terms[-back])
    if call.name.startswith("gather"):
        index_ = call[call.args[2]]
        call.give([index_.terms[d] if d in dims else t for d, t in enumerate(traced.terms)])
    else:
        call.give(list(traced.terms))


@rule("topk", "sort", "argsort", "msort")
def order(call: Call) -> None:
    """Order the entries of one dimension: it is fixed, unless some are chosen by values that depend on weights."""
    source = call.inputs[0]
    traced = call[source]
    dim = call.kwargs.get("dim", call.arg(2 if call.name.startswith("topk") else 1, -1))
    chosen = call.name == "topk" and not traced.origin.constant
    if not chosen:
        call.fix(traced.terms[dim])
    for position, output in enumerate(call.outputs):
        terms = list(traced.terms)
        if chosen or output.shape[dim] != source.shape[dim]:
            terms[dim] = call.fixed(output.shape[dim]) if output.shape[dim] > 1 else ONE
        call.give(terms, position)
    if chosen:
        call.chosen(traced.terms[dim], call.args[1], 1)
