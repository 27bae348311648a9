"""What each ATen operation says about the dimensions of its inputs and outputs: a short rule per family."""

from __future__ import annotations

from hf_prune.structure.rules import indexing, sums, views  # noqa: F401  (importing them fills the table)
from hf_prune.structure.rules.call import RULES, Call
from hf_prune.structure.rules.elementwise import UNIFORM_FACTORIES, broadcast, factory
from hf_prune.structure.unify import Conflict, fix

__all__ = ["RULES", "UNIFORM_FACTORIES", "Call", "apply"]


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
        call.tracer.unsupported_ops.setdefault(call.name, call.tracer.where)
        call.tracer.fix_all(list(call.view.values()), f"no rule for operation {call.name!r} (in {call.tracer.where})")
    if call.name.removesuffix("_") not in indexing.LOOK_UPS and not call.name.endswith("_like"):
        for chooses in (call[tensor].chooses for tensor in call.inputs):
            if chooses is not None and call.tracer.lookup(call.outputs[0]).chooses is None:
                fix(chooses, f"{call.why} does arithmetic on the numbers of what was chosen")
    for tensor in call.outputs:
        if id(tensor) not in call.tracer.known:
            call.tracer.fresh(tensor, call.origin)
        assert len(call.tracer.known[id(tensor)].terms) == tensor.dim(), call.name
