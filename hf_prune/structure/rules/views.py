"""Operations that split, join and move dimensions."""

from __future__ import annotations

from hf_prune.structure.rules.call import ONE, Call, rule
from hf_prune.structure.unify import (
    Atom,
    Cat,
    Conflict,
    Prod,
    Term,
    leaves,
    resolve,
    split_concat,
    split_product,
)


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy")
def view(call: Call) -> None:
    """Split or join dimensions, row-major."""
    source = call.inputs[0]
    if source.dtype != call.outputs[0].dtype:
        raise NotImplementedError
    traced = call[source]
    call.give(reshape(traced.terms, list(call.outputs[0].shape), call), like=traced)


def reshape(terms: list[Term], shape: list[int], call: Call) -> list[Term]:
    """Layouts after a row-major reshape to `shape`."""
    found = [term for term in terms if term.size != 1]
    result: list[Term] = []
    group: Term = ONE
    for position, size in enumerate(shape):
        if size == 1:
            result.append(ONE)
            continue
        while group.size < size or group.size % size:
            if not found:
                raise Conflict("sizes do not match")
            group = Prod((group, found.pop(0)))
        try:
            lead, rest = split_product(group, size)
        except Conflict:  # entries regrouped across a boundary: none of them can be removed
            call.fix(group)
            lead, rest = call.fixed(size), call.fixed(group.size // size)
        result.append(lead)
        group = rest
        del position
    return result


@rule("t", "transpose", "permute", "movedim", "swapaxes")
def permute(call: Call) -> None:
    """Move dimensions."""
    source = call.inputs[0]
    traced = call[source]
    order = list(range(source.dim()))
    if call.name.startswith("permute"):
        order = [d % source.dim() for d in call.args[1]]
    elif source.dim() > 1:
        a, b = (0, 1) if call.name.startswith("t") and len(call.args) == 1 else call.args[1:3]
        order[a], order[b] = order[b], order[a]
    call.give([traced.terms[d] for d in order], like=traced)


@rule("unsqueeze", "squeeze")
def unsqueeze(call: Call) -> None:
    """Dimensions of size 1 come or go."""
    traced = call[call.inputs[0]]
    found = [term for term in traced.terms if term.size != 1]
    terms: list[Term] = [ONE if size == 1 else found.pop(0) for size in call.outputs[0].shape]
    call.give(terms, like=traced)


@rule("view_as_complex", "view_as_real")
def view_as_complex(call: Call) -> None:
    """Real and imaginary part become one entry, or two."""
    traced = call[call.inputs[0]]
    if call.name == "view_as_real":
        call.give([*traced.terms, call.fixed(2)], like=traced)
    else:
        call.fix(traced.terms[-1])
        call.give(traced.terms[:-1], like=traced)


@rule("flip", "roll")
def flip(call: Call) -> None:
    """Entries of these dimensions change places: none can be removed."""
    traced = call[call.inputs[0]]
    for dim in call.args[-1] or range(len(traced.terms)):
        call.fix(traced.terms[dim])
    call.give(list(traced.terms))


@rule("unfold")
def unfold(call: Call) -> None:
    """Sliding windows over one dimension."""
    source, dim, size = call.args[:3]
    traced = call[source]
    dim %= source.dim()
    call.fix(traced.terms[dim])
    terms = [call.fixed(call.outputs[0].shape[dim]) if d == dim else term for d, term in enumerate(traced.terms)]
    call.give([*terms, call.fixed(size)], like=traced)


@rule("expand", "expand_copy")
def expand(call: Call) -> None:
    """A dimension of size 1 stretches to a new one."""
    source, shape = call.inputs[0], call.outputs[0].shape
    traced = call[source]
    offset = len(shape) - source.dim()
    terms: list[Term] = [
        traced.terms[d - offset] if d >= offset and source.shape[d - offset] == size else Atom(size, same=True)
        for d, size in enumerate(shape)
    ]
    call.give(terms, like=traced)


@rule("repeat")
def repeat(call: Call) -> None:
    """Tiling: a new leading factor."""
    source, shape = call.inputs[0], call.outputs[0].shape
    traced = call[source]
    padded = [ONE] * (len(shape) - source.dim()) + list(traced.terms)
    call.give([Prod((Atom(size // term.size, same=True), term)) for size, term in zip(shape, padded, strict=True)])


@rule("select")
def select(call: Call) -> None:
    """One entry of a dimension."""
    source, dim, index = call.inputs[0], call.args[1], call.args[2]
    traced = call[source]
    term = traced.terms[dim]
    if source.shape[dim] > 1:
        index %= source.shape[dim]
        call.fix(term)
    dim %= source.dim()
    call.give([t for d, t in enumerate(traced.terms) if d != dim], like=traced)


@rule("slice", "narrow")
def slice_(call: Call) -> None:
    """A run of entries; with a step, every n-th one."""
    source = call.inputs[0]
    dim, start, end, step = call.arg(1, 0), call.arg(2), call.arg(3), call.arg(4, 1)
    size, traced = source.shape[dim], call[source]
    start = min(max((start or 0) + (size if (start or 0) < 0 else 0), 0), size)
    end = size if end is None else min(max(end + (size if end < 0 else 0), start), size)
    term: Term = traced.terms[dim]
    if step != 1 and size % step == 0 and end == size and start < step:
        inner = split_product(term, size // step)[0]  # every n-th entry: (units × n), one of the n
        term = inner
    elif step != 1:
        call.fix(term)
        term = call.fixed(call.outputs[0].shape[dim])
    elif end - start != size:
        term = run(call, term, start, end)
    terms = list(traced.terms)
    terms[dim] = term
    call.give(terms, like=traced)


def run(call: Call, term: Term, start: int, end: int) -> Term:
    """Entries `start` to `end` of a dimension; across the boundaries of a product nothing can be removed."""
    if start == end:
        return Cat(())
    try:
        rest = split_concat(term, start)[1] if start > 0 else term
        return split_concat(rest, end - start)[0] if end - start < rest.size else rest
    except Conflict:
        call.fix(term)
        return call.fixed(end - start)


@rule(
    "split",
    "split_with_sizes",
    "unsafe_split",
    "chunk",
    "unbind",
    "split_with_sizes_copy",
    "split_copy",
    "unsafe_chunk",
)
def split(call: Call) -> None:
    """Runs of entries, one per output."""
    source = call.inputs[0]
    traced = call[source]
    if call.name.startswith("unbind"):
        dim = call.arg(1, 0) % source.dim()
        call.fix(traced.terms[dim])
        for position in range(len(call.outputs)):
            call.give([t for d, t in enumerate(traced.terms) if d != dim], position, like=traced)
        return
    dim = call.arg(2, call.kwargs.get("dim", 0))
    start = 0
    for position, output in enumerate(call.outputs):
        end = start + output.shape[dim]
        terms = list(traced.terms)
        if end - start != source.shape[dim]:
            terms[dim] = run(call, traced.terms[dim], start, end)
        call.give(terms, position, like=traced)
        start = end


@rule("cat", "concatenate")
def cat(call: Call) -> None:
    """Join tensors along one dimension; the others agree."""
    dim = call.arg(1, call.kwargs.get("dim", 0)) % call.outputs[0].dim()
    tensors = [t for t in call.args[0] if t.dim() > dim and t.shape[dim] > 0] or call.args[0][:1]
    terms = list(call[tensors[0]].terms)
    for other in tensors[1:]:
        for d, term in enumerate(call[other].terms):
            if d != dim:
                call.unify(terms[d], term)
    if len(tensors) > 1:
        terms[dim] = _joined(call, [call[t].terms[dim] for t in tensors])
    call.give(terms)
    chooses = [call[t].chooses for t in tensors]
    if chooses[0] is not None and all(c is not None and resolve(c) is resolve(chooses[0]) for c in chooses):
        call.chosen(chooses[0], call.outputs[0].shape[dim], 0)  # one choice after another


def _joined(call: Call, found: list[Term]) -> Term:
    atoms = [atom for term in found for atom in leaves(term)]
    if not call.origin.constant or len(set(atoms)) < len(atoms):
        return resolve(Cat(found))
    # Different constants side by side (ALiBi slopes of 2**n heads, then of the others) say nothing of weights.
    whole = Atom(sum(term.size for term in found))
    for atom in atoms:
        whole.fixed = whole.fixed or atom.fixed
    return whole


@rule("stack")
def stack(call: Call) -> None:
    """Join tensors along a new dimension."""
    dim = call.arg(1, call.kwargs.get("dim", 0)) % call.outputs[0].dim()
    terms = list(call[call.args[0][0]].terms)
    for other in call.args[0][1:]:
        for a, b in zip(terms, call[other].terms, strict=True):
            call.unify(a, b)
    terms.insert(dim, call.fixed(len(call.args[0])))
    call.give(terms)


@rule("constant_pad_nd", "pad")
def pad(call: Call) -> None:
    """Padded dimensions grow by fixed entries, or shrink."""
    source, amounts = call.inputs[0], call.args[1]
    traced = call[source]
    terms = list(traced.terms)
    for back in range(len(amounts) // 2):
        before, after = amounts[2 * back], amounts[2 * back + 1]
        dim = source.dim() - 1 - back
        term = terms[dim]
        if before < 0 or after < 0:
            term = run(call, term, max(-before, 0), source.shape[dim] - max(-after, 0))
        if before > 0 or after > 0:
            padding = [call.fixed(max(before, 0)), call.fixed(max(after, 0))]
            term = Cat([part for part in (padding[0], term, padding[1]) if part.size])
        terms[dim] = term
    call.give(terms)
