"""One traced operation, and the table of rules."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_prune.structure.tracing import Origin, Traced, Tracer
from hf_prune.structure.unify import (
    Atom,
    Prod,
    Term,
    fix,
    leaves,
    mix,
    unify,
)

if TYPE_CHECKING:
    from torch import Tensor

ONE = Prod(())


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
        same = (None, None) if like is None else (like.parameter, like.chooses)
        self.tracer.declare(tensor, Traced(terms, origin, *same))

    def unify(self, a: Term, b: Term) -> None:
        """Equate two dimensions."""
        unify(a, b, self.why)

    def mix(self, term: Term) -> None:
        """This operation mixes all entries of a dimension."""
        mix(term, self.why)

    def fix(self, term: Term) -> None:
        """Entries of this dimension cannot be removed."""
        fix(term, self.why)

    def chosen(self, term: Term, number: int, output: int) -> None:
        """Integers of an output name entries of a dimension, of which this operation chooses so many.

        Of groups as many of each as it takes to find them in those groups that were chosen before.
        """
        self.tracer.known[id(self.outputs[output])].chooses = term
        found = list(leaves(term))
        groups = math.prod(atom.chosen or atom.size for atom in found[:-1])
        for atom in found:
            atom.chosen = max(atom.chosen, number)
        if found:
            found[-1].least = max(found[-1].least, math.ceil(number / groups))

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


def note_role(roles: dict[str, list[Term]], traced: Traced, terms: list[Term]) -> None:
    """Note that an operation produces, or sums over, these dimensions of a parameter."""
    if traced.parameter is not None:
        roles.setdefault(traced.parameter, []).extend(terms)
