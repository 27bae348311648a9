"""Trace one forward pass without memory and write down, as equations between dimensions, what every operation says.

`Forward` sees each ATen operation; `rules` has one rule per operation.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_prune.structure.forward import Forward
from hf_prune.structure.unify import Atom, Term, fix, instantiate

if TYPE_CHECKING:
    from torch import nn


class Origin:
    """What a storage holds; shared by all views of it."""

    __slots__ = ("constant", "varying", "weighs")

    def __init__(self, constant: bool, varying: bool, weighs: Term | None = None) -> None:
        self.constant = constant
        """Depends neither on a parameter nor on the hidden states."""
        self.varying = varying
        """A constant whose entries may differ (false for zeros and ones)."""
        self.weighs = weighs
        """The dimension along which it holds weights that a softmax made."""


@dataclass(slots=True)
class Traced:
    """What is known of one tensor: the layout of each dimension, its origin, and the parameter it is a view of."""

    terms: list[Term]
    origin: Origin
    parameter: str | None = None
    chooses: Term | None = None
    """The dimension whose entries its integers name (top-k indices)."""


@dataclass(frozen=True)
class ConstantInput:
    """A constant tensor handed to a module, with the layouts of its dimensions."""

    module_path: str
    name: str
    shape: tuple[int, ...]
    terms: tuple[Term, ...]


class Tracer(Forward):  # type: ignore[no-untyped-call]
    """Collects the equations of one forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, Traced] = {}
        self.used: set[str] = set()
        """Parameters that some operation read."""
        self.consumed: dict[str, list[Term]] = {}
        self.produced: dict[str, list[Term]] = {}
        self.token_tables: set[str] = set()
        """Parameters in which token ids are looked up."""
        self.apart: dict[str, int] = {}
        """Modules whose attention heads are computed one by one (each with its own norm), and how many they are."""
        self.unsupported_ops: dict[str, str] = {}
        """Operations without a rule, and the module where each was first met."""
        self.constant_inputs: list[ConstantInput] = []
        self.outputs: dict[str, Any] = {}
        """What each module returned: `None` for a tensor, else its nesting as `outputs_of` writes it."""

    def declare(self, tensor: Tensor, traced: Traced) -> None:
        """Say what is known of `tensor`."""
        self.known[id(tensor)] = traced

    def declare_parameter(self, name: str, tensor: Tensor) -> Traced:
        """Give each dimension of a parameter (or saved buffer) an unknown of its size."""
        traced = Traced([Atom(n) for n in tensor.shape], Origin(constant=False, varying=True), name)
        self.declare(tensor, traced)
        return traced

    def fresh(self, tensor: Tensor, origin: Origin) -> Traced:
        """Unknown layouts for all dimensions of `tensor`."""
        traced = Traced([Atom(n) for n in tensor.shape], origin)
        self.declare(tensor, traced)
        return traced

    def lookup(self, tensor: Tensor) -> Traced:
        """What is known of `tensor`; one never seen before is a constant."""
        found = self.known.get(id(tensor))
        return found if found is not None else self.fresh(tensor, Origin(constant=True, varying=True))

    def saw(
        self, func: Any, name: str, args: Any, kwargs: dict[str, Any], inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        """Apply the rule of an operation."""
        from hf_prune.structure import rules  # rules import this file

        for tensor in inputs:
            self.lookup(tensor)
        known = [self.known[id(tensor)] for tensor in inputs]
        self.used.update(traced.parameter for traced in known if traced.parameter is not None)
        constant = all(traced.origin.constant for traced in known)
        if not constant and func._schema.is_mutable and inputs:
            known[0].origin.constant = False  # written to: all views of it follow
        view = self._instantiated(inputs) if not constant else {id(t): k for t, k in zip(inputs, known, strict=True)}
        origin = Origin(
            constant,
            any(k.origin.varying for k in known) if known else name not in rules.UNIFORM_FACTORIES,
            next((k.origin.weighs for k in known if k.origin.weighs is not None), None),
        )
        call = rules.Call(self, name, args, kwargs, inputs, outputs, view, origin)
        rules.apply(call, pointwise=torch.Tag.pointwise in func.tags)

    def entered(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Note the constants that are handed to a module."""
        super().entered(path, module, args, kwargs)
        if len(args) > 1:
            kwargs = {**dict(zip(list(inspect.signature(module.forward).parameters), args, strict=False)), **kwargs}
        for name, value in kwargs.items():
            found = self.known.get(id(value)) if isinstance(value, Tensor) else None
            if found is not None and found.origin.constant:
                self.constant_inputs.append(ConstantInput(path, name, tuple(value.shape), tuple(found.terms)))

    def left(self, path: str, module: nn.Module, args: Any, output: Any) -> None:
        """Note what a module returned."""
        super().left(path, module, args, output)
        self.outputs[path] = outputs_of(output)

    def _instantiated(self, inputs: list[Tensor]) -> dict[int, Traced]:
        fresh: dict[tuple[int, ...], Atom] = {}
        view = {}
        for tensor in inputs:
            traced = self.known[id(tensor)]
            if traced.origin.constant:
                terms = [instantiate(term, traced.origin.varying, fresh) for term in traced.terms]
                traced = Traced(terms, traced.origin, traced.parameter)
            view[id(tensor)] = traced
        return view

    def fix_all(self, known: list[Traced], why: str) -> None:
        """Fix everything that an operation touches."""
        for traced in known:
            for term in traced.terms:
                fix(term, why)


def outputs_of(value: Any) -> Any:
    """The nesting of what a module returned: "zeros" for a tensor, `None`, a list of these; "other" for the rest."""
    if isinstance(value, Tensor):
        return "zeros"
    if value is None:
        return None
    if isinstance(value, (tuple, list)):
        return [outputs_of(item) for item in value]
    return "other"


def trace(model: nn.Module) -> tuple[Tracer, dict[str, list[Term]]]:
    """Run `model` (built without weights: parameters on the meta device) once.

    Returns:
        The tracer with all equations, and the layouts of every tensor of the state dict by name.

    Raises:
        TraceError: the forward pass does not run without values.
    """
    tracer = Tracer()
    terms = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        traced = tracer.known.get(id(tensor)) or tracer.declare_parameter(name, tensor)
        terms[name] = traced.terms
    tracer.run(model)
    return tracer, terms
