"""What each ATen operation says about the dimensions of its inputs and outputs: a short rule per family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from hf_prune.structure.tracing import Origin, Traced, Tracer
from hf_prune.structure.unify import (
    Atom,
    Cat,
    Conflict,
    Prod,
    Term,
    fix,
    leaves,
    mix,
    resolve,
    split_concat,
    split_product,
    unify,
)

ONE = Prod(())
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


@dataclass(slots=True)
class Call:
    """One operation: its arguments, and what is known of its tensors."""

    tracer: Tracer
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[Tensor]
    outputs: list[Tensor]
    view: dict[int, Traced]
    origin: Origin

    def __getitem__(self, tensor: Tensor) -> Traced:
        return self.view[id(tensor)]

    def arg(self, position: int, default: Any = None) -> Any:
        """A positional argument, or its default."""
        return self.args[position] if len(self.args) > position else default

    @property
    def why(self) -> str:
        """The reason given when this operation cannot be reconciled."""
        return f"operation {self.name!r} in {self.tracer.where}"

    def give(self, terms: list[Term], output: int = 0, like: Traced | None = None) -> None:
        """Say what an output is. `like`: the output is a view of that tensor (or of a parameter, cast or scaled)."""
        tensor = self.outputs[output]
        if id(tensor) in self.view and self.name.endswith("_"):
            return  # in place: the tensor keeps its layouts
        origin = like.origin if like is not None else self.origin
        self.tracer.declare(tensor, Traced(terms, origin, like.parameter if like is not None else None))

    def unify(self, a: Term, b: Term) -> None:
        """Equate two dimensions."""
        unify(a, b, self.why)

    def mix(self, term: Term) -> None:
        """This operation mixes all entries of a dimension."""
        mix(term, self.why)

    def fix(self, term: Term) -> None:
        """Entries of this dimension cannot be removed."""
        fix(term, self.why)

    def fixed(self, size: int) -> Atom:
        """A new dimension whose entries cannot be removed."""
        atom = Atom(size)
        atom.fixed = self.why
        return atom


Rule = Callable[[Call], None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations of these names (in-place variants included)."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = RULES[name + "_"] = function
        return function

    return register


def apply(call: Call, pointwise: bool) -> None:
    """Apply the rule of an operation; an operation without one fixes all it touches."""
    found = RULES.get(call.name)
    if found is None and pointwise:
        found = broadcast
    if found is None and not call.inputs:
        found = factory
    try:
        if found is None:
            raise NotImplementedError
        found(call)
    except Conflict:  # the rule knows the operation, but the layouts do not fit
        call.tracer.fix_all(list(call.view.values()), call.why)
    except (NotImplementedError, IndexError):
        call.tracer.without_rule.setdefault(call.name, call.tracer.where)
        call.tracer.fix_all(list(call.view.values()), f"no rule for operation {call.name!r} (in {call.tracer.where})")
    for tensor in call.outputs:
        if id(tensor) not in call.tracer.known:
            call.tracer.fresh(tensor, call.origin)
        assert len(call.tracer.known[id(tensor)].terms) == tensor.dim(), call.name


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


# --- element by element ---------------------------------------------------------------------------------------------


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
    call.give(list(traced.terms), like=traced if shares else Traced([], call.origin, traced.parameter))


@rule("cumsum", "cumprod", "logcumsumexp")
def cumulative(call: Call) -> None:
    """A running sum mixes its dimension and leaves the others alone."""
    traced = call[call.inputs[0]]
    call.mix(traced.terms[call.arg(1, 0)])
    call.give(list(traced.terms))


# --- views ----------------------------------------------------------------------------------------------------------


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
        traced.terms[d - offset] if d >= offset and source.shape[d - offset] == size else Atom(size)
        for d, size in enumerate(shape)
    ]
    call.give(terms, like=traced)


@rule("repeat")
def repeat(call: Call) -> None:
    """Tiling: a new leading factor."""
    source, shape = call.inputs[0], call.outputs[0].shape
    traced = call[source]
    padded = [ONE] * (len(shape) - source.dim()) + list(traced.terms)
    call.give([Prod((Atom(size // term.size), term)) for size, term in zip(shape, padded, strict=True)])


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


# --- looking up -----------------------------------------------------------------------------------------------------


@rule("embedding")
def embedding(call: Call) -> None:
    """Rows of a table: its first dimension is the vocabulary."""
    weight, ids = call.args[0], call.args[1]
    table = call[weight]
    fix(table.terms[0], "a vocabulary: looked up by index")
    _role(call.tracer.produced, table, [table.terms[1]])
    call.give([*call[ids].terms, table.terms[1]])


@rule("nonzero")
def nonzero(call: Call) -> None:
    """Places of true entries, one per row."""
    call.give(
        [Atom(call.outputs[0].shape[0]), ONE if call.outputs[0].shape[1] == 1 else call.fixed(call.inputs[0].dim())]
    )


@rule("index_select", "index", "_unsafe_index")
def index(call: Call) -> None:
    """Entries by index: the indexed dimensions are fixed, the others stay."""
    source = call.args[0]
    traced = call[source]
    if call.name.startswith("index_select"):
        dim = call.args[1] % source.dim()
        indexed: dict[int, Tensor] = {dim: call.args[2]}
    else:
        indexed = {d: i for d, i in enumerate(call.args[1]) if i is not None}
    if any(i.dtype.is_floating_point or i.dtype.itemsize == 1 for i in indexed.values()):
        raise NotImplementedError
    if len(indexed) == 1 and (picked := _constant_run(*indexed.items())) is not None:
        d, start, end = picked
        call.give(
            [run(call, t, start % t.size, (end - 1) % t.size + 1) if i == d else t for i, t in enumerate(traced.terms)]
        )
        return
    for d in indexed:
        call.fix(traced.terms[d])
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


def _constant_run(item: tuple[int, Tensor]) -> tuple[int, int, int] | None:
    """Dimension, start and end if the index is a known list of successive entries (`x[..., [-2], :]`)."""
    dim, ids = item
    known = getattr(ids, "constant", None)
    if known is None or known.dim() != 1 or known.numel() == 0:
        return None
    with unset_fake_temporarily():
        values = known.tolist()
    return (dim, values[0], values[-1] + 1) if values == list(range(values[0], values[-1] + 1)) else None


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
        call.fix(traced.terms[d])
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


@rule("topk", "sort", "argsort", "kthvalue", "mode", "msort")
def order(call: Call) -> None:
    """Order the entries of one dimension: it is fixed."""
    source = call.inputs[0]
    traced = call[source]
    dim = call.kwargs.get("dim", call.arg(2 if call.name.startswith("topk") else 1, -1))
    if isinstance(dim, bool) or not isinstance(dim, int):
        dim = -1
    call.fix(traced.terms[dim])
    for position, output in enumerate(call.outputs):
        terms = list(traced.terms)
        if output.shape[dim] != source.shape[dim]:
            terms[dim] = call.fixed(output.shape[dim])
        call.give(terms, position)


# --- sums over a dimension ------------------------------------------------------------------------------------------


def _role(roles: dict[str, list[Term]], traced: Traced, terms: list[Term]) -> None:
    if traced.parameter is not None:
        roles.setdefault(traced.parameter, []).extend(terms)


def contract(
    call: Call, a: Traced, b: Traced, pairs: list[tuple[Term, Term]], kept_a: list[Term], kept_b: list[Term]
) -> None:
    """Sum of products over the dimensions `pairs`."""
    tracer = call.tracer
    for left, right in pairs:
        call.unify(left, right)
        if a.parameter is None and b.parameter is None:
            call.mix(left)
    _role(tracer.consumed, a, [left for left, _ in pairs])
    _role(tracer.consumed, b, [right for _, right in pairs])
    _role(tracer.produced, a, kept_a)
    _role(tracer.produced, b, kept_b)


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
)
def reduction(call: Call) -> None:
    """Mixes the reduced dimensions."""
    _reduce(call, call.arg(1, call.kwargs.get("dim")))


@rule("logsumexp", "argmax", "argmin", "count_nonzero", "aminmax", "median")
def reduction_too(call: Call) -> None:
    """Mixes the reduced dimensions."""
    _reduce(call, call.arg(1, call.kwargs.get("dim")))


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
    if source.dim() >= 3 and not traced.origin.constant:
        for d, term in enumerate(traced.terms):
            if d != dim:
                _mark_heads(term)
    call.give(list(traced.terms))


def _mark_heads(term: Term) -> None:
    for atom in leaves(term):
        atom.heads = True


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


@rule(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_fused_attention_overrideable",
)
def attention(call: Call) -> None:
    """Scaled dot product attention on `[b, h, t, e]`."""
    q, k, v = (call[t] for t in call.args[:3])
    for d in (0, 1):
        call.unify(q.terms[d], k.terms[d])
        call.unify(q.terms[d], v.terms[d])
        _mark_heads(q.terms[d])
    call.unify(k.terms[2], v.terms[2])
    call.unify(q.terms[3], k.terms[3])
    call.mix(q.terms[3])
    call.mix(k.terms[2])
    call.give([q.terms[0], q.terms[1], q.terms[2], v.terms[3]])
