"""The structure of a model: its axes, and the layout of every tensor in its state dict over them. No weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from hf_prune.structure import layouts as lay

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from hf_prune.structure.layouts import Layout, Widths

T = TypeVar("T")

Kind = Literal["attention", "mlp", "query_heads", "expert_channels", "expert", "hidden", "layer", "vocab"]
Branch = Literal["attention", "mlp"]
BRANCHES: tuple[Branch, ...] = ("attention", "mlp")
"""In the order in which they are repaired: the MLP reads what the attention wrote."""
Role = Literal["producer", "consumer", "other"]
Counted = Literal["decoder", "model", "active"]
"""Whose parameters: of attention and MLP in the decoder layers, of the whole model, or of those in the decoder layers
the ones that each token meets: of experts as many as it is sent to."""
BRANCH_OF: dict[str, Branch] = {"attention": "attention", "mlp": "mlp", "experts": "mlp"}
"""First word of an axis's name after `layers.{i}.` → the branch whose removal takes the axis with it."""


@dataclass(frozen=True)
class Axis:
    """Units that several parameter dimensions share.

    Per-layer axes are named `layers.{i}.attention` (units: KV groups; query heads where there is one KV head) and
    `layers.{i}.mlp` (`layers.{i}.mlp.{name}` where a layer has several), and `layers.{i}.experts` (units: whole experts
    with their rows of the router; masked: the router never chooses them). The others are `hidden`, `layers` (units:
    whole decoder layers), `layers.attention` and `layers.mlp` (units: the attention, or the MLP, of each layer), and
    `vocab` (units: tokens, rows of the embedding and of the head).

    Of an axis in blocks each block keeps equally many units, each its own: `layers.{i}.attention.queries`, the query
    heads of all KV groups, and `layers.{i}.mlp.channels` (`layers.{i}.mlp.{name}.channels`), the channels of all
    experts, of which `layers.{i}.mlp` takes the same ones of each. Its units are numbered through all blocks, in order,
    those of removed blocks included.
    """

    name: str
    kind: Kind
    layer: int | None
    """Decoder layer, `None` for axes of the whole model."""
    num_units: int
    exact: bool = True
    """Removing units equals masking them (false where a norm mixes all units)."""
    blocker: str = ""
    """Why the axis cannot be pruned; empty if it can."""
    multiple_of: int = 1
    """Widths (of each block) must be multiples of this to run: 8 where experts are multiplied as one grouped product,
    whose rows must be aligned to 16 bytes."""
    least: int = 1
    """Units (of each block) that must stay: as many experts as each token is sent to, or finds in each group."""
    num_chosen: int = 0
    """Of experts: how many each token is sent to."""
    num_blocks: int = 1
    """Blocks of `num_units / num_blocks` units, that keep equally many."""
    block: str = ""
    """The axis whose units the blocks are, if they are units."""
    tied: str = ""
    """The axis that has one unit for the same unit of all blocks, if there is one."""

    @property
    def branch(self) -> Branch | None:
        """The branch of its layer that goes with all of its units; `None` for axes of the whole model."""
        return None if self.layer is None else "attention" if self.kind in ("attention", "query_heads") else "mlp"

    @property
    def is_inner(self) -> bool:
        """Whether its units are parts of another axis's: a plan lists it only where it is asked for."""
        return bool(self.block or self.tied)

    @property
    def prunable(self) -> bool:
        """Whether units of this axis can be removed by score; tokens never are: a text or a list says which stay."""
        return not self.blocker and self.num_units > self.least * self.num_blocks and self.kind != "vocab"

    def first(self, width: int) -> tuple[int, ...]:
        """The first units that `width` units may be: as many of each block."""
        each = self.num_units // self.num_blocks
        starts = range(0, self.num_units, each)
        return tuple(start + unit for start in starts for unit in range(width // self.num_blocks))


@dataclass(frozen=True)
class Member:
    """One parameter dimension that carries an axis."""

    parameter: str
    dim: int
    role: Role
    """`producer`: the operation's output carries the axis; `consumer`: the operation sums over it."""


@dataclass(frozen=True)
class Owner:
    """The decoder layer and branch that a parameter belongs to."""

    layer: int
    branch: Branch | None


@dataclass(frozen=True)
class BranchModule:
    """The module that computes the attention or the MLP of one layer, so that it can be left out as a whole."""

    path: str
    """Relative to the layer, e.g. `self_attn`."""
    outputs: Any
    """What it returns: "zeros" for a tensor, `None`, or a list of these."""


@dataclass(frozen=True)
class SlicedArgument:
    """A constant handed to a module that carries an axis (ALiBi slopes): sliced on entry.

    Dimension `dim` of argument `name`, seen as row-major product of `sizes` (-1: any), carries the axis as its factor
    number `factor`.
    """

    module_path: str
    name: str
    dim: int
    sizes: tuple[int, ...]
    factor: int


@dataclass(frozen=True)
class CacheTensor:
    """A tensor that a decoder layer keeps while tokens are generated."""

    layer: int
    axis: str | None
    """Axis whose width it is proportional to."""
    numel: int
    """Elements for each sequence in the dense model; where it grows, for each token of it."""
    grows: bool
    """Whether it grows with the tokens (keys, values), or is a state of one size."""
    most_tokens: int | None
    """Tokens that it keeps at most: those of a sliding window."""


@dataclass(frozen=True)
class Structure:
    """Axes of a model and the layout of every tensor of its state dict over them. Holds no weights.

    `layouts` has one entry per name of the state dict (tied names each have theirs) with one layout per dimension.
    """

    model_type: str
    axes: dict[str, Axis]
    layouts: dict[str, tuple[Layout, ...]]
    members: dict[str, tuple[Member, ...]]
    layer_paths: tuple[str, ...]
    """Module path of each decoder layer, e.g. `model.layers.0`."""
    owners: dict[str, Owner]
    """Layer and branch of each parameter inside a decoder layer."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Tied names → the name that counts."""
    buffers: frozenset[str] = frozenset()
    """Names in `layouts` that are buffers: saved and sliced, not counted as parameters."""
    branch_modules: dict[str, BranchModule] = field(default_factory=dict)
    """`layers.{i}.attention`, `layers.{i}.mlp` → the module to leave out."""
    selected_inputs: dict[str, tuple[SlicedArgument, ...]] = field(default_factory=dict)
    """Axis → the constants that carry it."""
    cache: tuple[CacheTensor, ...] | None = field(default=None, compare=False)
    """What is kept while tokens are generated; `None` if not asked for, or unknown."""
    unsupported_ops: dict[str, str] = field(default_factory=dict)
    """Operations that no tracing rule covers → the module that first ran them. The axes they touch are fixed."""

    _known: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    def once(self, what: Hashable, find: Callable[[], T]) -> T:
        """What `find` finds out of the model, found out once; it is not to be changed."""
        if what not in self._known:
            self._known[what] = find()
        return self._known[what]  # type: ignore[no-any-return]

    @cached_property
    def widths(self) -> dict[str, int]:
        """Units of every axis of the dense model."""
        return {name: axis.num_units for name, axis in self.axes.items()}

    def axes_of(self, kind: Kind) -> list[Axis]:
        """The axes of one kind, in layer order."""
        return [axis for axis in self.axes.values() if axis.kind == kind]

    def parameters_of_layer(self, axis: str, layer: int) -> list[str]:
        """Parameters that go with unit `layer` of an axis of layers: the layer's or a branch's; tied ones once."""
        branch = {"layers": None, "layers.attention": "attention", "layers.mlp": "mlp"}[axis]
        return [
            name
            for name, owner in self.owners.items()
            if owner.layer == layer
            and branch in (None, owner.branch)
            and name not in self.aliases
            and name not in self.buffers
        ]

    def group(self, axis: Axis) -> list[str]:
        """Parameters of the coupled groups of an axis; tied ones once."""
        if axis.kind == "layer":
            return [name for unit in range(axis.num_units) for name in self.parameters_of_layer(axis.name, unit)]
        names = {self.aliases.get(m.parameter, m.parameter): None for m in self.members[axis.name]}
        return [name for name in names if name not in self.buffers]

    def num_parameters(self, widths: Widths | None = None, budget: Counted = "model") -> int:
        """Exact parameter count at `widths` (default: dense); tied parameters count once.

        Widths of the kind `layer` are not counted here: removed layers depend on which layers go, see
        `PruningPlan.num_parameters`.
        """
        widths = widths or {}
        return sum(self.size_in(budget)(name, widths) for name in self.counted(budget))

    def size_in(self, budget: Counted) -> Callable[[str, Widths | None], int]:
        """How `budget` counts one parameter at given widths."""
        return self.num_active if budget == "active" else self.numel

    def counted(self, budget: Counted) -> list[str]:
        """Names of the parameters that `budget` counts: all, or attention and MLP parameters of the decoder layers."""
        names = [name for name in self.layouts if name not in self.aliases and name not in self.buffers]
        if budget == "model":
            return names
        return [name for name in names if (owner := self.owners.get(name)) is not None and owner.branch is not None]

    def numel(self, name: str, widths: Widths | None = None) -> int:
        """Number of elements of one tensor at `widths`."""
        return math.prod(self.shape(name, widths))

    def num_active(self, name: str, widths: Widths | None = None) -> int:
        """`numel`, but of experts only as many as each token is sent to; routers count whole."""
        numel, widths = self.numel(name, widths), widths or {}
        for layout in self.layouts[name]:
            for axis in lay.axes(layout):
                if self.axes[axis].kind == "expert" and self._is_looked_up(name, axis):
                    numel = numel // max(1, lay.size(layout, widths)) * self.axes[axis].num_chosen
        return numel

    def _is_looked_up(self, name: str, axis: str) -> bool:
        router = any(member.parameter == name and member.role == "producer" for member in self.members[axis])
        return len(self.layouts[name]) > (2 if router else 1)

    def shape(self, name: str, widths: Widths | None = None) -> tuple[int, ...]:
        """Shape of one tensor at `widths`."""
        widths = widths or {}
        return tuple(lay.size(layout, widths) for layout in self.layouts[name])
