"""Trace one forward pass without memory and write down, as equations between dimensions, what every operation says.

A `TorchDispatchMode` sees each ATen operation of a model run on fake tensors; `rules` has one rule per operation.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hf_prune.structure.known_values import KnownValues
from hf_prune.structure.unify import Atom, Term, fix, instantiate

if TYPE_CHECKING:
    from collections.abc import Iterator

BATCH_SIZE, SEQ_LEN = 2, 11


class TraceError(Exception):
    """A forward pass that cannot be traced: what was raised, and in which module."""

    def __init__(self, error: Exception, where: str) -> None:
        lines = [line for line in str(error).splitlines() if line.strip()]
        super().__init__(f"{type(error).__name__}: {lines[0] if lines else 'no message'} (in {where})"[:300])
        self.needs_values = isinstance(error, (DataDependentOutputException, DynamicOutputShapeException))


class Origin:
    """What a storage holds; shared by all views of it."""

    __slots__ = ("constant", "varying")

    def __init__(self, constant: bool, varying: bool) -> None:
        self.constant = constant
        """Depends neither on a parameter nor on the hidden states."""
        self.varying = varying
        """A constant whose entries may differ (false for zeros and ones)."""


@dataclass(slots=True)
class Traced:
    """What is known of one tensor: the layout of each dimension, its origin, and the parameter it is a view of."""

    terms: list[Term]
    origin: Origin
    parameter: str | None = None


@dataclass(frozen=True)
class ConstantInput:
    """A constant tensor handed to a module, with the layouts of its dimensions."""

    module_path: str
    name: str
    shape: tuple[int, ...]
    terms: tuple[Term, ...]


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects the equations of one forward pass."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values = KnownValues(fake)
        self.known: dict[int, Traced] = {}
        self.alive: list[Tensor] = []  # ids stay unique while their tensors live
        self.consumed: dict[str, list[Term]] = {}
        self.produced: dict[str, list[Term]] = {}
        self.without_rule: dict[str, str] = {}
        """Operations without a rule, and the module where each was first met."""
        self.constant_inputs: list[ConstantInput] = []
        self.outputs: dict[str, Any] = {}
        """What each module returned: `None` for a tensor, else its nesting as `outputs_of` writes it."""
        self.module_path: list[str] = []

    def declare(self, tensor: Tensor, traced: Traced) -> None:
        """Say what is known of `tensor`."""
        self.known[id(tensor)] = traced
        self.alive.append(tensor)

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

    @property
    def where(self) -> str:
        """Path of the module whose forward runs now."""
        return self.module_path[-1] if self.module_path else "the model"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from hf_prune.structure import rules  # rules import this file

        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        inputs = list(tensors((args, kwargs)))
        decided = self.values.decide(name, args)
        out = func(*args, **kwargs) if decided is None else decided
        outputs = list(tensors(out))
        if not outputs:
            return out
        if decided is None:
            self.values.follow(func, args, kwargs, inputs, outputs)
        for tensor in inputs:
            self.lookup(tensor)
        known = [self.known[id(tensor)] for tensor in inputs]
        constant = all(traced.origin.constant for traced in known)
        if not constant and func._schema.is_mutable and inputs:
            known[0].origin.constant = False  # written to: all views of it follow
        view = self._instantiated(inputs) if not constant else {id(t): k for t, k in zip(inputs, known, strict=True)}
        origin = Origin(
            constant, any(k.origin.varying for k in known) if known else name not in rules.UNIFORM_FACTORIES
        )
        call = rules.Call(self, name, args, kwargs, inputs, outputs, view, origin)
        rules.apply(call, pointwise=torch.Tag.pointwise in func.tags)
        return out

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


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and dictionaries, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


def outputs_of(value: Any) -> Any:
    """The nesting of what a module returned: "zeros" for a tensor, `None`, a list of these; "other" for the rest."""
    if isinstance(value, Tensor):
        return "zeros"
    if value is None:
        return None
    if isinstance(value, (tuple, list)):
        return [outputs_of(item) for item in value]
    return "other"


@contextlib.contextmanager
def _module_hooks(tracer: Tracer, model: nn.Module) -> Iterator[None]:
    handles = []

    def enter(path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        tracer.module_path.append(path)
        if len(args) > 1:
            kwargs = {**dict(zip(list(inspect.signature(module.forward).parameters), args, strict=False)), **kwargs}
        for name, value in kwargs.items():
            _note_constant(tracer, path, name, value)

    def leave(path: str, module: nn.Module, args: Any, output: Any) -> None:
        tracer.outputs[path] = outputs_of(output)
        tracer.module_path.pop()

    for path, module in model.named_modules():
        if path:
            handles.append(module.register_forward_pre_hook(partial(enter, path), with_kwargs=True))
            handles.append(module.register_forward_hook(partial(leave, path)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _note_constant(tracer: Tracer, path: str, name: str, value: Any) -> None:
    if isinstance(value, Tensor) and (traced := tracer.known.get(id(value))) is not None and traced.origin.constant:
        tracer.constant_inputs.append(ConstantInput(path, name, tuple(value.shape), tuple(traced.terms)))


def trace(model: nn.Module) -> tuple[Tracer, dict[str, list[Term]]]:
    """Run `model` (built without weights: parameters on the meta device) once on fake tensors.

    Returns:
        The tracer with all equations, and the layouts of every tensor of the state dict by name.

    Raises:
        TraceError: the forward pass does not run without values.
    """
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # what fails is raised, and reported
    names = model.state_dict(keep_vars=True)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        tracer = Tracer(fake)
        fakes = _make_fake(model, fake)
        terms = {}
        for name, original in names.items():
            tensor = fakes[id(original)]
            traced = tracer.known.get(id(tensor)) or tracer.declare_parameter(name, tensor)
            terms[name] = traced.terms
        with torch.no_grad(), _module_hooks(tracer, model), tracer:
            input_ids = torch.ones((BATCH_SIZE, SEQ_LEN), dtype=torch.int64)
            try:
                model(input_ids=input_ids, use_cache=False)
            except Exception as error:  # whatever a model's own code raises
                raise TraceError(error, tracer.where) from error
    return tracer, terms


def _make_fake(model: nn.Module, fake: FakeTensorMode) -> dict[int, Tensor]:
    """Replace the parameters and saved buffers of `model` by fake CPU tensors; tied ones stay tied."""
    fakes: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in fakes:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                fakes[id(parameter)] = nn.Parameter(empty, requires_grad=False)
            module._parameters[name] = fakes[id(parameter)]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            if id(buffer) not in fakes:
                real = buffer.device.type != "meta"
                fakes[id(buffer)] = (
                    fake.from_tensor(buffer) if real else torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
                )
            module._buffers[name] = fakes[id(buffer)]
    return fakes
