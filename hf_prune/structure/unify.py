"""Unification of dimensions: what a type checker does for types, done for the dimensions of tensors.

Every dimension starts as an unknown `Atom` of its size. Equations from operations bind atoms to each other, to products
(`view` splits a dimension row-major) and concatenations (`split`, `cat`) of smaller ones. What cannot be reconciled is
*fixed*: never pruned, never wrong.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class Conflict(Exception):  # noqa: N818  (a signal between rules, never seen by users)
    """Two layouts of one dimension do not fit each other."""


class Atom:
    """An unknown run of entries. `bound` points to what it turned out to be."""

    __slots__ = ("attended", "bound", "chosen", "fixed", "heads", "least", "mixed", "origins", "same", "size")

    def __init__(self, size: int, same: bool = False) -> None:
        self.size: int = size
        self.bound: Term | None = None
        self.fixed = ""
        """Why its entries cannot be removed."""
        self.mixed = ""
        """Which operation mixes all its entries, so that removing differs from masking."""
        self.heads = False
        """Attention scores are computed independently for each entry."""
        self.least = 0
        """So many of its entries are chosen where it is a part of what is chosen from (experts inside of a group)."""
        self.chosen = 0
        """So many of its entries are chosen by their values (experts, by a router's top-k); 0: none are."""
        self.attended = False
        """Values that attention takes a weighted mean of."""
        self.same = same
        """All its entries are one that was stretched."""
        self.origins: list[Atom] = []
        """Atoms of constants whose values differ along this one (ALiBi slopes), see `instantiate`."""


class Prod:
    """Row-major product."""

    __slots__ = ("factors", "size")

    def __init__(self, factors: Sequence[Term]) -> None:
        self.factors = tuple(factors)
        self.size: int = math.prod(factor.size for factor in factors)


class Cat:
    """Concatenation."""

    __slots__ = ("parts", "size")

    def __init__(self, parts: Sequence[Term]) -> None:
        self.parts = tuple(parts)
        self.size: int = sum(part.size for part in parts)


Term = Atom | Prod | Cat


def factors(term: Term) -> list[Term]:
    """Resolve `term` to a flat list of factors, each an unbound atom or a concatenation; entries of size 1 vanish."""
    while isinstance(term, Atom) and term.bound is not None:
        term = term.bound
    if term.size == 1:
        return []
    if isinstance(term, Prod):
        return [flat for factor in term.factors for flat in factors(factor)]
    if isinstance(term, Cat):
        flat = parts(term)
        return factors(flat[0]) if len(flat) == 1 else [Cat(flat)]
    return [term]


def parts(term: Term) -> list[Term]:
    """Resolve `term` to a flat list of concatenated parts."""
    while isinstance(term, Atom) and term.bound is not None:
        term = term.bound
    if term.size == 0:
        return []
    if isinstance(term, Cat):
        return [flat for part in term.parts for flat in parts(part)]
    if isinstance(term, Prod) and len(found := factors(term)) == 1:
        return [term] if isinstance(found[0], Atom) else parts(found[0])
    return [term]


def resolve(term: Term) -> Term:
    """The simplest form of `term`: an unbound atom, a product of several factors or a concatenation of parts."""
    found = factors(term)
    return found[0] if len(found) == 1 else Prod(found)


def leaves(term: Term) -> Iterator[Atom]:
    """Yield the unbound atoms of `term`."""
    for factor in factors(term):
        if isinstance(factor, Atom):
            yield factor
        elif isinstance(factor, Cat):
            for part in factor.parts:
                yield from leaves(part)


def fix(term: Term, why: str) -> None:
    """Mark every atom of `term` as not removable, and say why."""
    for atom in leaves(term):
        atom.fixed = atom.fixed or why


def mix(term: Term, why: str) -> None:
    """Mark every atom of `term` as mixed by an operation over all its entries."""
    for atom in leaves(term):
        atom.mixed = atom.mixed or why


def bind(atom: Atom, term: Term) -> None:
    """Equate an unbound atom with `term`; what is known of the atom then holds for all atoms of `term`."""
    found = list(leaves(term))
    if atom in found:
        if len(found) > 1:
            raise Conflict("an axis would contain itself")
        return
    atom.bound = term
    for leaf in found:
        leaf.fixed = leaf.fixed or atom.fixed
        leaf.mixed = leaf.mixed or atom.mixed
        leaf.heads = leaf.heads or atom.heads
        leaf.chosen = max(leaf.chosen, atom.chosen)
        leaf.least = max(leaf.least, atom.least)
        leaf.attended = leaf.attended or atom.attended
        leaf.same = leaf.same and atom.same
        leaf.origins.extend(atom.origins)


def unify(a: Term, b: Term, why: str) -> None:
    """Equate two layouts of one dimension. What does not fit is fixed on both sides, with `why` as the reason."""
    try:
        _unify(a, b)
    except Conflict:
        fix(a, why)
        fix(b, why)


def _unify(a: Term, b: Term) -> None:
    a, b = resolve(a), resolve(b)
    if a is b:
        return
    if a.size != b.size:
        raise Conflict(f"{a.size} and {b.size} entries")
    if isinstance(a, Atom):
        bind(a, b)
    elif isinstance(b, Atom):
        bind(b, a)
    elif isinstance(a, Cat) or isinstance(b, Cat):
        _unify_parts(a, b)
    else:
        _unify_factors(a, b)


def _unify_factors(a: Term, b: Term) -> None:
    left, right = factors(a), factors(b)
    while left and right:
        n = min(left[0].size, right[0].size)
        (x, left), (y, right) = _take(left, n), _take(right, n)
        _unify(x, y)
    if left or right:
        raise Conflict("products of different sizes")


def _take(found: list[Term], n: int) -> tuple[Term, list[Term]]:
    lead, rest = split_product(Prod(found), n)
    return lead, factors(rest)


def _unify_parts(a: Term, b: Term) -> None:
    repeated, other = (a, b) if isinstance(a, Prod) else (b, a)
    if isinstance(repeated, Prod) and isinstance(other, Cat):
        sizes = {part.size for part in other.parts}
        count, inner = split_product(repeated, len(other.parts)) if len(sizes) == 1 else (None, None)
        if count is not None and inner is not None:  # n × I against [I + I + ...]: the same rows, n is not prunable
            fix(count, "a concatenation of equal parts")
            for part in other.parts:
                _unify(part, inner)
            return
    left, right = parts(a), parts(b)
    while left and right:
        n = min(left[0].size, right[0].size)
        (x, left), (y, right) = _cut(left, n), _cut(right, n)
        _unify(x, y)


def _cut(found: list[Term], n: int) -> tuple[Term, list[Term]]:
    if found[0].size == n:
        return found[0], found[1:]
    lead, rest = split_concat(found[0], n)
    return lead, [*parts(rest), *found[1:]]


def split_product(term: Term, n: int) -> tuple[Term, Term]:
    """Split `term` row-major into a leading factor of size `n` and the rest."""
    found, lead = factors(term), []
    while n > 1:
        if not found:
            raise Conflict("nothing left to split")
        factor = found.pop(0)
        if n % factor.size == 0:
            lead.append(factor)
            n //= factor.size
        elif factor.size % n == 0:
            head, tail = _split_factor(factor, n)
            lead.append(head)
            found.insert(0, tail)
            n = 1
        else:
            raise Conflict(f"{factor.size} entries do not split into {n}")
    return resolve(Prod(lead)), resolve(Prod(found))


def _split_factor(factor: Term, n: int) -> tuple[Term, Term]:
    inner = factor.size // n
    if isinstance(factor, Atom):
        made = Atom(n), Atom(inner)
        bind(factor, Prod(made))
        return made
    assert isinstance(factor, Cat)
    if any(part.size % inner for part in factor.parts):
        raise Conflict("a split across concatenated parts")
    halves = [split_product(part, part.size // inner) for part in factor.parts]
    for _, tail in halves[1:]:
        _unify(halves[0][1], tail)
    return resolve(Cat([head for head, _ in halves])), halves[0][1]


def split_concat(term: Term, n: int) -> tuple[Term, Term]:
    """Split `term` into its first `n` entries and the rest."""
    found = parts(term)
    if len(found) > 1:
        lead: list[Term] = []
        while n > 0:
            part = found.pop(0)
            if part.size > n:
                part, rest = split_concat(part, n)
                found.insert(0, rest)
            lead.append(part)
            n -= part.size
        return resolve(Cat(lead)), resolve(Cat(found))
    term = resolve(found[0])
    if isinstance(term, Atom):
        made = Atom(n), Atom(term.size - n)
        bind(term, Cat(made))
        return made
    assert isinstance(term, Prod)
    inner = term.size // term.factors[0].size
    if n % inner:
        raise Conflict("a cut inside a product")
    first, rest = split_concat(term.factors[0], n // inner)
    tail = term.factors[1:]
    return resolve(Prod((first, *tail))), resolve(Prod((rest, *tail)))


def instantiate(term: Term, varying: bool, fresh: dict[tuple[int, ...], Atom]) -> Term:
    """Copy `term` with fresh atoms, as a polymorphic type is instantiated.

    A constant (rotary angles, ALiBi slopes, a mask) meets the weights of every layer; without a copy per use it would
    tie the layers' axes together. `origins` of the fresh atoms remember the constants whose values differ along them.
    How a constant was put together (ALiBi slopes of six heads: four and two) says nothing about the weights it meets.
    """
    copies: list[Term] = []
    for factor in factors(term):
        found = list(leaves(factor))
        key = tuple(id(atom) for atom in found)
        if key not in fresh:
            copy = fresh[key] = Atom(factor.size)
            copy.fixed = next((atom.fixed for atom in found if atom.fixed), "")
            copy.mixed = next((atom.mixed for atom in found if atom.mixed), "")
            if varying:
                copy.origins.extend(atom for atom in found if not atom.same)
        copies.append(fresh[key])
    return resolve(Prod(copies)) if len(copies) != 1 else copies[0]
