"""The algebra of unification, against its brute-force meaning: which unit of which axes every position carries."""

from __future__ import annotations

import contextlib
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_prune.structure.unify import (
    Atom,
    Cat,
    Conflict,
    Prod,
    bind,
    factors,
    fix,
    instantiate,
    leaves,
    parts,
    resolve,
    split_concat,
    split_product,
    unify,
)


def meaning(term):
    """For each position the (atom, unit) pairs that it carries, outermost first."""
    while isinstance(term, Atom) and term.bound is not None:
        term = term.bound
    if isinstance(term, Atom):
        return [()] if term.size == 1 else [((id(term), unit),) for unit in range(term.size)]
    if isinstance(term, Cat):
        return [position for part in term.parts for position in meaning(part)]
    found = [()]
    for factor in term.factors:
        found = [outer + inner for outer in found for inner in meaning(factor)]
    return found


@st.composite
def terms(draw, size=None, depth=2):
    """A random term of `size` entries, of fresh atoms."""
    if size is None:
        size = draw(st.sampled_from([4, 6, 8, 12, 24]))
    kind = draw(st.sampled_from(["atom", "prod", "cat"])) if depth and size > 3 else "atom"
    if kind == "prod" and (divisors := [n for n in range(2, size) if size % n == 0]):
        n = draw(st.sampled_from(divisors))
        return Prod((draw(terms(n, depth - 1)), draw(terms(size // n, depth - 1))))
    if kind == "cat":
        n = draw(st.integers(1, size - 1))
        return Cat((draw(terms(n, depth - 1)), draw(terms(size - n, depth - 1))))
    return Atom(size)


@given(terms())
def test_simplifying_keeps_the_meaning(term):
    assert meaning(resolve(term)) == meaning(Prod(factors(term))) == meaning(Cat(parts(term))) == meaning(term)
    assert len(meaning(term)) == term.size
    assert {id(atom) for atom in leaves(term)} == {key for position in meaning(term) for key, _ in position}


@given(terms(), st.data())
def test_split_product_keeps_the_meaning(term, data):
    n = data.draw(st.sampled_from([n for n in range(1, term.size + 1) if term.size % n == 0]))
    try:
        lead, rest = split_product(term, n)
    except Conflict:
        assert not isinstance(resolve(term), Atom)  # an unknown dimension always splits
        return
    assert (lead.size, rest.size) == (n, term.size // n)
    assert meaning(Prod((lead, rest))) == meaning(term)


@given(terms(), st.data())
def test_split_concat_keeps_the_meaning(term, data):
    n = data.draw(st.integers(1, term.size - 1))
    try:
        first, rest = split_concat(term, n)
    except Conflict:
        assert not isinstance(resolve(term), Atom)
        return
    assert (first.size, rest.size) == (n, term.size - n)
    assert meaning(first) + meaning(rest) == meaning(term)


@given(st.data())
def test_unified_terms_mean_the_same_or_are_fixed(data):
    size = data.draw(st.sampled_from([4, 6, 8, 12, 24]))
    a, b = data.draw(terms(size)), data.draw(terms(size))
    unify(a, b, "they differ")
    found = [*leaves(a), *leaves(b)]
    if any(not atom.fixed for atom in found):
        # A count of equal parts (n × I against [I + I]) is fixed by itself; the rest must agree.
        free = {id(atom) for atom in found if not atom.fixed}
        visible = [[[pair for pair in position if pair[0] in free] for position in meaning(term)] for term in (a, b)]
        assert visible[0] == visible[1]
    else:
        assert all(atom.fixed for atom in found)


@given(st.data())
def test_chained_unification_ties_all(data):
    size = data.draw(st.sampled_from([6, 12]))
    chain = [data.draw(terms(size)), Atom(size), Atom(size), Atom(size)]
    for left, right in data.draw(st.permutations(list(itertools.pairwise(chain)))):
        unify(left, right, "never")
    assert len({tuple(meaning(term)) for term in chain}) == 1
    assert not any(atom.fixed for atom in leaves(chain[0]))


def test_equal_parts_unify_with_a_product():
    head, inner, left, right = Atom(2), Atom(5), Atom(5), Atom(5)
    unify(Prod((head, inner)), Cat((left, right)), "no")
    assert resolve(inner) is resolve(left) is resolve(right)
    assert head.fixed
    assert not resolve(left).fixed


def test_sizes_that_do_not_fit_fix_both_sides():
    a, b = Prod((Atom(2), Atom(3))), Prod((Atom(3), Atom(2)))
    unify(a, b, "2 × 3 is not 3 × 2")
    assert {atom.fixed for atom in (*leaves(a), *leaves(b))} == {"2 × 3 is not 3 × 2"}


@given(terms(12))
def test_what_is_known_of_an_atom_holds_for_what_it_turns_out_to_be(term):
    atom, origin = Atom(12), Atom(12)
    atom.fixed, atom.mixed, atom.heads, atom.origins = "kept", "normalised", True, [origin]
    unify(atom, term, "never")
    for leaf in leaves(term):
        assert (leaf.fixed, leaf.mixed, leaf.heads, leaf.origins) == ("kept", "normalised", True, [origin])


def test_an_axis_cannot_contain_itself():
    atom = Atom(6)
    with pytest.raises(Conflict):
        bind(atom, Cat((atom, Atom(2))))


@given(terms(), st.booleans())
def test_instances_share_nothing_with_the_constant(term, varying):
    fresh: dict = {}
    one, again, other = (
        instantiate(term, varying, fresh),
        instantiate(term, varying, fresh),
        instantiate(term, varying, {}),
    )
    assert one.size == term.size
    assert meaning(one) == meaning(again)
    assert not {id(atom) for atom in leaves(one)} & {id(atom) for atom in (*leaves(term), *leaves(other))}
    origins = [origin for atom in leaves(one) for origin in atom.origins]
    assert {id(atom) for atom in origins} == ({id(atom) for atom in leaves(term)} if varying else set())
    fix(one, "only this one")
    assert not any(atom.fixed for atom in leaves(term))


def test_binding_an_instance_leaves_the_constant_alone():
    term = Cat((Atom(4), Atom(2)))
    first, second = instantiate(term, True, {}), instantiate(term, True, {})
    with contextlib.suppress(Conflict):
        unify(first, Prod((Atom(2), Atom(3))), "never")
    assert isinstance(resolve(second), Atom)
    assert resolve(term).size == 6
