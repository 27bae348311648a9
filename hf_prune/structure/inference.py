"""From the equations of one traced forward pass to named axes: the structure of any causal LM, from its config."""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from hf_prune.errors import StructureError
from hf_prune.format.building import build_empty, fresh_config
from hf_prune.reading import check_files
from hf_prune.structure import layouts as lay
from hf_prune.structure.axes import (
    Axis,
    Branch,
    BranchModule,
    Kind,
    Member,
    Owner,
    Role,
    SlicedArgument,
    Structure,
)
from hf_prune.structure.cache import find_cache
from hf_prune.structure.forward import TraceError
from hf_prune.structure.layouts import Concat, Fixed, Layout, Product, Units
from hf_prune.structure.tracing import ConstantInput, Tracer, trace
from hf_prune.structure.unify import Atom, Cat, Prod, Term, factors, fix, leaves, resolve

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

    from transformers import PreTrainedConfig, PreTrainedModel

EXPERT_ALIGNMENT = 8
"""Grouped matrix products want rows of whole 16 bytes: 8 entries of 2 bytes."""


def infer_structure(source: PreTrainedConfig | PreTrainedModel | str, *, cache: bool = False) -> Structure:
    """Infer the axes of a causal LM from one forward pass without memory. Allocates no weights, at any size.

    Args:
        source: a config, a model (its class and config are used, not its weights), or a directory or Hub id.
        cache: find `Structure.cache` too, by a second forward pass.

    Returns:
        The structure of the model that `source` describes.

    Raises:
        StructureError: the model cannot be built or traced from its config; the message names the operation in the way.
    """
    config, cls = _config_and_class(source)
    model = build_empty(traceable_config(config), cls)
    try:
        tracer, terms = trace(model)
    except TraceError as error:
        why = "Operations whose result shape depends on values cannot be inferred; the" if error.needs_values else "The"
        raise StructureError(
            f"{config.model_type}: the forward pass cannot be traced without weights: {error}. "
            f"{why} model cannot be pruned."
        ) from error
    found = _Naming(model, tracer, terms, find_layers(model, tracer.outputs)).structure(config.model_type)
    return replace(found, cache=find_cache(model, found.axes)) if cache else found


def _config_and_class(source: Any) -> tuple[Any, type | None]:
    if isinstance(source, (str, os.PathLike)):
        from transformers import AutoConfig

        check_files(Path(source))
        return AutoConfig.from_pretrained(source, trust_remote_code=False), None
    if isinstance(source, nn.Module):
        return source.config, type(source)
    return source, None


def traceable_config(config: Any) -> Any:
    """A copy of `config` whose forward pass shows every operation: eager attention, experts as batched products."""
    copy = fresh_config(config)
    copy._attn_implementation = "eager"
    copy._experts_implementation = "batched_mm"
    return copy


def find_layers(model: nn.Module, ran: Container[str]) -> tuple[str, ...]:
    """Module paths of the decoder layers: the list of modules that holds most parameters of modules that ran."""
    best: tuple[int, str, nn.ModuleList] | None = None
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            running = [child for index, child in enumerate(module) if f"{path}.{index}" in ran]
            count = sum(parameter.numel() for child in running for parameter in child.parameters())
            if count > (0 if best is None else best[0]):
                best = (count, path, module)
    if best is None:
        raise StructureError(f"{type(model).__name__} has no list of decoder layers; it cannot be pruned.")
    return tuple(f"{best[1]}.{index}" for index in range(len(best[2])))


@dataclass
class _Found:
    """An atom that lies on parameters of one decoder layer."""

    atom: Atom
    layer: int
    places: list[tuple[str, int]] = field(default_factory=list)
    consumers: list[tuple[str, int]] = field(default_factory=list)
    producers: list[tuple[str, int]] = field(default_factory=list)


class _Naming:
    """Finds which atoms are the prunable axes, and names them."""

    def __init__(self, model: nn.Module, tracer: Tracer, terms: dict[str, list[Term]], layers: tuple[str, ...]) -> None:
        self.tracer, self.terms, self.layers = tracer, terms, layers
        self.buffers = {name for name, _ in model.named_buffers()}
        self.aliases = _aliases(model)
        self.local: set[int] = set()  # atoms all of whose parameters lie in one decoder layer
        prefix = {path + ".": index for index, path in enumerate(layers)}
        self.layer_of = {name: next((i for p, i in prefix.items() if name.startswith(p)), None) for name in terms}
        self.consumed = {name: _atom_ids(found) for name, found in tracer.consumed.items()}
        self.produced = {name: _atom_ids(found) for name, found in tracer.produced.items()}
        embedding: nn.Module | None = model.get_input_embeddings()  # type: ignore[operator]
        self.embedding = next(
            (n for n, p in model.named_parameters() if embedding is not None and p is embedding.weight), None
        )
        head: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator]
        self.head = next((n for n, p in model.named_parameters() if head is not None and p is head.weight), None)
        for name in tracer.token_tables - {self.embedding}:
            fix(terms[name][0], "looked up by index")

    def structure(self, model_type: str) -> Structure:
        """Name the axes and freeze the layouts."""
        named: dict[int, Axis] = {}
        layer_atoms = self._layer_atoms()
        found: dict[str, tuple[_Found, Axis]] = {}
        for layer in range(len(self.layers)):
            here = [f for f in layer_atoms if f.layer == layer]
            kinds: tuple[tuple[Kind, list[_Found]], ...] = (
                ("attention", self._attention(here)),
                ("mlp", self._mlp(here)),
                ("expert", self._experts(here)),
            )
            for kind, chosen in kinds:
                for name, axis_found in self._names(layer, "experts" if kind == "expert" else kind, chosen):
                    axis = self._axis(name, kind, axis_found)
                    found[name] = (axis_found, axis)
                    if axis.num_units == axis_found.atom.size * axis.num_blocks:
                        named[id(axis_found.atom)] = axis
                    for inner in self._inside(axis_found, here) if kind == "attention" else ():
                        found[f"{name}.queries"] = inner, self._queries(f"{name}.queries", inner, axis)
                        named[id(inner.atom)] = found[f"{name}.queries"][1]
            for name, (entry, axis) in list(found.items()):
                if axis.kind == "mlp" and axis.layer == layer and (num_blocks := self._num_stacked(entry)) > 1:
                    found[f"{name}.channels"] = entry, self._channels(entry, axis, num_blocks, named)
        hidden = self._hidden(named)
        owners, roots = self._owners(found)
        branch_modules = self._branch_modules(found, roots)
        axes = {name: axis for name, (_, axis) in found.items()}
        if hidden is not None:
            axes["hidden"] = hidden
        axes.update(self._vocabulary(named))
        axes.update(self._layer_axes(branch_modules))
        axes.update(self._shared_attention(axes))
        own = {axis.tied: axis for axis in axes.values() if axis.tied}
        frozen = {name: tuple(_freeze(term, named, own) for term in terms) for name, terms in self.terms.items()}
        return Structure(
            model_type=model_type,
            axes=axes,
            layouts=frozen,
            members=dict.fromkeys(axes, ()) | self._members(frozen, named),
            layer_paths=self.layers,
            owners=owners,
            aliases=self.aliases,
            buffers=frozenset(self.buffers & set(self.terms)),
            branch_modules=branch_modules,
            selected_inputs={n: s for n, (f, _) in found.items() if (s := self._selected_inputs(n, f))},
            unsupported_ops=dict(sorted(self.tracer.unsupported_ops.items())),
        )

    # --- which atoms ------------------------------------------------------------------------------------------------

    def _layer_atoms(self) -> list[_Found]:
        """Atoms all of whose parameters lie in one decoder layer."""
        by_atom: dict[int, _Found] = {}
        layers: dict[int, set[int | None]] = {}
        for name, terms in self.terms.items():
            for dim, term in enumerate(terms):
                for atom in dict.fromkeys(leaves(term)):
                    layer = self.layer_of[name]
                    entry = by_atom.setdefault(id(atom), _Found(atom, -1 if layer is None else layer))
                    layers.setdefault(id(atom), set()).add(layer)
                    if name in self.aliases:
                        continue
                    entry.places.append((name, dim))
                    if id(atom) in self.consumed.get(name, ()):
                        entry.consumers.append((name, dim))
                    if id(atom) in self.produced.get(name, ()):
                        entry.producers.append((name, dim))
        self.local = {key for key, found in layers.items() if len(found) == 1 and None not in found}
        return [f for key, f in by_atom.items() if key in self.local and f.atom.size > 1]

    def _attention(self, here: list[_Found]) -> list[_Found]:
        """For each output projection the outermost axis along which attention is independent: KV groups, or heads."""
        chosen: dict[int, _Found] = {}
        for entry in here:
            if not entry.atom.heads or not entry.consumers:
                continue
            consumed = (atom for name, dim in entry.consumers for atom in leaves(self.terms[name][dim]))
            leads = all(self._leads(entry, name, dim) for name, dim in entry.places)
            if leads and all(id(atom) in self.local for atom in consumed):
                chosen[id(entry.atom)] = entry
        # a single head has no axis of its own: its values stand for it
        alone = [f for f in here if f.atom.attended and f.consumers and f.producers and not self._has_heads(f)]
        return list(chosen.values()) or alone

    def _has_heads(self, entry: _Found) -> bool:
        """Whether some dimension of `entry` holds heads too."""
        return any(atom.heads for name, dim in entry.places for atom in leaves(self.terms[name][dim]))

    def _shared_attention(self, axes: dict[str, Axis]) -> dict[str, Axis]:
        """Attention axes that cannot be pruned: their heads are shared (a table of position biases), or elsewhere.

        XLM has its attention modules in another list than those that count as its layers.
        """
        result = {}
        apart = (n for n in self.consumed if self.layer_of[n] is None and any(a.heads for a in _all(self.terms[n])))
        elsewhere = "" if any(axis.kind == "attention" for axis in axes.values()) else next(apart, "")
        for layer in range(len(self.layers)):
            if any(axis.layer == layer and axis.kind == "attention" for axis in axes.values()):
                continue
            consumed = [term for name in self.consumed if self.layer_of[name] == layer for term in self.terms[name]]
            heads = next((atom for term in consumed for atom in leaves(term) if atom.heads), None)
            name = f"layers.{layer}.attention"
            if heads is None and elsewhere:
                blocker = f"it is outside of the list of decoder layers, as {elsewhere} is"
                result[name] = Axis(name, "attention", layer, 1, blocker=blocker)
            if heads is not None and id(heads) not in self.local:
                outside = [name for name in self.terms if self.layer_of[name] != layer]
                other = next((name for name in outside if heads in _all(self.terms[name])), "another layer")
                blocker = f"its heads are shared with {other}"
                result[name] = Axis(name, "attention", layer, heads.size, blocker=blocker)
        return result

    def _is_inside(self, path: str, layer: int) -> bool:
        return f"{path}.".startswith(f"{self.layers[layer]}.")

    def _inside(self, outer: _Found, here: list[_Found]) -> list[_Found]:
        """The axis of heads inside of the units of `outer`, if there is one: the query heads of KV groups."""
        return [
            entry
            for entry in here
            if entry.atom.heads
            and entry.consumers
            and entry is not outer
            and all(_follows(self.terms[name][dim], outer.atom, entry.atom) for name, dim in entry.places)
        ][:1]

    def _num_stacked(self, entry: _Found) -> int:
        """Experts, where all tensors of an axis are stacked by them; else 0."""
        places = [self.terms[name] if dim > 0 else [] for name, dim in entry.places]
        sizes = {terms[0].size if terms else 0 for terms in places}
        return sizes.pop() if len(sizes) == 1 and any(len(terms) > 2 for terms in places) else 0

    def _channels(self, entry: _Found, tied: Axis, num_blocks: int, named: dict[int, Axis]) -> Axis:
        """The axis of the channels of all experts, each with its own, where `tied` has the same ones of all."""
        experts = factors(self.terms[entry.places[0][0]][0])[-1]
        block = named[id(experts)].name if id(experts) in named else ""
        return replace(
            tied,
            name=f"{tied.name}.channels",
            kind="expert_channels",
            num_units=num_blocks * tied.num_units,
            num_blocks=num_blocks,
            block=block,
            tied=tied.name,
        )

    def _queries(self, name: str, entry: _Found, block: Axis) -> Axis:
        """The axis of the query heads inside of KV groups."""
        why = entry.atom.fixed
        if not why and entry.atom.origins:
            why = "a constant of the model differs along it"
        n = block.num_units
        exact = not entry.atom.mixed
        return Axis(name, "query_heads", entry.layer, n * entry.atom.size, exact, why, num_blocks=n, block=block.name)

    def _leads(self, entry: _Found, name: str, dim: int) -> bool:
        """Whether `entry` is the outermost axis of heads of one dimension of a parameter."""
        return next((atom for atom in leaves(self.terms[name][dim]) if atom.heads), None) is entry.atom

    def _mlp(self, here: list[_Found]) -> list[_Found]:
        """Axes between two projections of one layer that have nothing to do with heads.

        The second projection leads back to the residual stream, else the axis is only the rank of a factored weight. Of
        a product (heads × channels of a linear attention or state-space layer) the outermost axis is taken.
        """
        chosen = []
        for entry in here:
            atom = entry.atom
            if atom.heads or atom.chosen or atom.attended or not entry.consumers or not entry.producers:
                continue
            if self._has_heads(entry):
                continue  # value dimensions of attention
            if any(atom.heads for n, _ in entry.consumers for term in self.terms[n] for atom in leaves(term)):
                continue  # a low-rank query, key or value projection
            if any(
                self._leaves_layer(name, entry) and self._is_lead(name, dim, entry) for name, dim in entry.consumers
            ):
                chosen.append(entry)
        return chosen

    def _experts(self, here: list[_Found]) -> list[_Found]:
        """Axes of which a router's top-k chooses entries, and by which weights `[experts, ...]` are looked up.

        Of groups of experts, the place inside of a group.
        """
        found = []
        for entry in here:
            stacked = [
                factors(self.terms[name][0]) for name, dim in entry.places if len(self.terms[name]) > 2 and not dim
            ]
            if entry.atom.chosen and stacked and all(own[-1] is entry.atom for own in stacked):
                found.append(entry)
        return found

    def _leaves_layer(self, name: str, entry: _Found) -> bool:
        """Whether a parameter of `entry` also has a dimension that the layer shares with the rest of the model."""
        return any(id(atom) not in self.local for term in self.terms[name] for atom in leaves(term) if atom.size > 1)

    def _is_lead(self, name: str, dim: int, entry: _Found) -> bool:
        """Whether `entry` is the outermost axis, entirely inside its layer, of one dimension of a parameter."""
        inside = (atom for atom in leaves(self.terms[name][dim]) if id(atom) in self.local and not atom.fixed)
        return next(inside, entry.atom) is entry.atom

    def _names(self, layer: int, kind: str, chosen: list[_Found]) -> Iterable[tuple[str, _Found]]:
        base = f"layers.{layer}.{kind}"
        if len(chosen) == 1:
            return [(base, chosen[0])]
        taken: dict[str, _Found] = {}
        for entry in chosen:
            path = self._root(entry).removeprefix(self.layers[layer]).strip(".")
            tail = ".".join(part for part in path.split(".") if part not in ("mlp", "feed_forward", "block_sparse_moe"))
            name = f"{base}.{tail}" if tail else base
            while name in taken:
                name += "_"
            taken[name] = entry
        return list(taken.items())

    def _root(self, entry: _Found) -> str:
        """Deepest module that holds all parameters of an axis."""
        modules = [name.split(".")[:-1] for name, _ in entry.places]
        shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*modules, strict=False))
        return ".".join(parts[0] for parts in shared)

    def _axis(self, name: str, kind: Kind, entry: _Found) -> Axis:
        atom = entry.atom
        if kind == "attention" and not atom.heads:
            apart = next((n for path, n in self.tracer.apart.items() if self._is_inside(path, entry.layer)), 0)
            blocker = "each of its heads has modules of its own" if apart else "it has one unit"
            return Axis(name, kind, entry.layer, apart or 1, blocker=blocker)
        blocker = atom.fixed
        if not blocker and atom.origins and not self._selected_inputs(name, entry):
            blocker = "a constant of the model differs along it, and is not handed to the layer as an argument"
        if not blocker and atom.size < 2:
            blocker = "it has one unit"
        if kind == "expert":
            totals = {self.terms[n][d].size for n, d in entry.places}  # more where they are chosen in groups
            if len(totals) > 1 or any(factors(self.terms[n][d])[-1] is not atom for n, d in entry.places):
                blocker = blocker or "not all of its tensors hold its experts in the same groups"
            num_units, least = max(totals), atom.least
            num_blocks = num_units // atom.size
            return Axis(name, kind, entry.layer, num_units, True, blocker, 1, least, atom.chosen, num_blocks)
        stacked = any(len(self.terms[parameter]) == 3 and dim > 0 for parameter, dim in entry.consumers)
        multiple_of = math.gcd(atom.size, EXPERT_ALIGNMENT) if stacked else 1
        return Axis(name, kind, entry.layer, atom.size, not atom.mixed, blocker, multiple_of)

    def _hidden(self, named: dict[int, Axis]) -> Axis | None:
        """The residual stream: the second dimension of the input embedding."""
        if self.embedding is None:
            return None
        term = resolve(self.terms[self.embedding][-1])
        if not isinstance(term, Atom):
            return None
        blocker = term.fixed
        if not blocker and term.origins:
            blocker = "a constant of the model (such as position encodings) differs along it"
        if not blocker and (writer := self._beside(term.size)):
            blocker = f"no text passes {writer}, which may write into it"
        named[id(term)] = axis = Axis("hidden", "hidden", None, term.size, exact=False, blocker=blocker)
        return axis

    def _vocabulary(self, named: dict[int, Axis]) -> dict[str, Axis]:
        """The tokens: rows of the embedding, and of the head and what is added to its output."""
        if self.embedding is None or self.head is None:
            return {}
        rows, logits = (resolve(self.terms[name][0]) for name in (self.embedding, self.head))
        others = sorted(self.tracer.token_tables - {self.embedding})
        if not isinstance(rows, Atom) or not isinstance(logits, Atom) or rows.size != logits.size:
            blocker = f"the rows of {self.head} are not those of {self.embedding}"
        elif others:
            blocker = f"{others[0]} has an entry for each token too"
        else:
            blocker = rows.fixed or logits.fixed or logits.mixed
        axis = Axis("vocab", "vocab", None, rows.size, blocker=blocker)
        if not blocker:
            named.update({id(rows): axis, id(logits): axis})
        return {"vocab": axis}

    def _beside(self, size: int) -> str:
        """A weight outside of the decoder layers, of that size, that text does not pass (a projector of images)."""
        unused = (n for n in self.terms if n not in self.tracer.used and n not in self.aliases)
        return next((n for n in unused if self.layer_of[n] is None and size in (t.size for t in self.terms[n])), "")

    def _selected_inputs(self, name: str, entry: _Found) -> tuple[SlicedArgument, ...]:
        """The arguments that hand varying constants to the layer's attention (or MLP); () if one is not handed on."""
        root = self._root(entry)
        result = []
        origins = {id(atom): atom for origin in entry.atom.origins for atom in leaves(origin)}
        inputs = [constant for constant in self.tracer.constant_inputs if constant.module_path == root]
        for origin in origins.values():
            use = next((u for constant in inputs if (u := _use(constant, origin, set(origins))) is not None), None)
            if use is None:
                return ()
            if use not in result:
                result.append(use)
        return tuple(result)

    # --- where parameters belong ------------------------------------------------------------------------------------

    def _owners(
        self, found: dict[str, tuple[_Found, Axis]]
    ) -> tuple[dict[str, Owner], dict[tuple[int, Branch], list[str]]]:
        roots: dict[tuple[int, Branch], list[str]] = {}
        leaf_modules: dict[str, Branch] = {}
        for entry, axis in found.values():
            root, branch = self._root(entry), axis.branch
            if axis.kind == "expert" or branch is None:
                continue  # a router may be outside of the module that holds the experts
            if root != self.layers[entry.layer]:
                roots.setdefault((entry.layer, branch), []).append(_child(root, self.layers[entry.layer]))
            for name, _ in entry.places:
                leaf_modules[name.rpartition(".")[0]] = branch
        owners = {}
        for name, layer in self.layer_of.items():
            if layer is None:
                continue
            inside = [
                b for (i, b), paths in roots.items() if i == layer and any(name.startswith(p + ".") for p in paths)
            ]
            owners[name] = Owner(layer, inside[0] if inside else leaf_modules.get(name.rpartition(".")[0]))
        return owners, roots

    def _branch_modules(
        self, found: dict[str, tuple[_Found, Axis]], roots: dict[tuple[int, Branch], list[str]]
    ) -> dict[str, BranchModule]:
        """Branches that are one module, whose output a stand-in can give."""
        result = {}
        for (layer, branch), paths in roots.items():
            entries = [entry for entry, axis in found.values() if axis.layer == layer and axis.branch == branch]
            other = [p for (i, b), found_paths in roots.items() if i == layer and b != branch for p in found_paths]
            whole = all(name.startswith(paths[0] + ".") for entry in entries for name, _ in entry.places)
            outputs = self.tracer.outputs.get(paths[0], "other")
            if len(set(paths)) == 1 and whole and paths[0] not in other and "other" not in _flat(outputs):
                result[f"layers.{layer}.{branch}"] = BranchModule(
                    paths[0].removeprefix(self.layers[layer] + "."), outputs
                )
        return result

    def _layer_axes(self, branch_modules: dict[str, BranchModule]) -> dict[str, Axis]:
        n = len(self.layers)
        axes = {"layers": Axis("layers", "layer", None, n)}
        for branch in ("attention", "mlp"):
            missing = [i for i in range(n) if f"layers.{i}.{branch}" not in branch_modules]
            blocker = f"{branch} of layer {missing[0]} is not one module with a tensor result" if missing else ""
            axes[f"layers.{branch}"] = Axis(f"layers.{branch}", "layer", None, n, blocker=blocker)
        return axes

    def _members(self, frozen: dict[str, tuple[Layout, ...]], named: dict[int, Axis]) -> dict[str, tuple[Member, ...]]:
        members: dict[str, list[Member]] = {}
        atoms = {name: key for key, axis in named.items() for name in (axis.name, f"{axis.name}.channels")}
        for name, found in frozen.items():
            if name in self.aliases:
                continue
            for dim, layout in enumerate(found):
                for axis in dict.fromkeys(lay.axes(layout)):
                    role: Role = "other"
                    if atoms[axis] in self.consumed.get(name, ()):
                        role = "consumer"
                    elif atoms[axis] in self.produced.get(name, ()):
                        role = "producer"
                    members.setdefault(axis, []).append(Member(name, dim, role))
        return {name: tuple(found) for name, found in members.items()}


def _aliases(model: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    aliases = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if (seen := first.setdefault(id(tensor), name)) != name:
            aliases[name] = seen
    return aliases


def _follows(term: Term, outer: Atom, inner: Atom) -> bool:
    """Whether `inner` is, wherever it is in `term`, a later factor than `outer`."""
    found = factors(term)
    before = found[: found.index(outer)] if outer in found else found
    return all(
        isinstance(factor, Cat) and all(_follows(part, outer, inner) for part in factor.parts)
        for factor in before
        if inner in leaves(factor)
    )


def _atom_ids(terms: list[Term]) -> set[int]:
    return {id(atom) for atom in _all(terms)}


def _all(terms: list[Term]) -> list[Atom]:
    return [atom for term in terms for atom in leaves(term)]


def _child(path: str, parent: str) -> str:
    """The direct child of `parent` on the way to `path`."""
    return parent + "." + path.removeprefix(parent + ".").split(".")[0]


def _flat(outputs: Any) -> list[Any]:
    return [leaf for item in outputs for leaf in _flat(item)] if isinstance(outputs, list) else [outputs]


def _use(constant: ConstantInput, origin: Atom, origins: set[int]) -> SlicedArgument | None:
    """Where `constant` carries `origin`: as a whole factor of one dimension, alone or among `origins`."""
    for dim, term in enumerate(constant.terms):
        found = factors(term)
        for position, factor in enumerate(found):
            carried = list(leaves(factor))
            if origin in carried and all(id(atom) in origins for atom in carried):
                sizes = [f.size for f in found]
                if len(sizes) > 1 and position > 0:
                    sizes[0] = -1  # the batch, of any size
                return SlicedArgument(constant.module_path, constant.name, dim, tuple(sizes), position)
    return None


def _freeze(term: Term, named: dict[int, Axis], own: dict[str, Axis]) -> Layout:
    """The frozen layout of one dimension: named axes, everything else fixed."""
    term = resolve(term)
    if isinstance(term, Atom):
        axis = named.get(id(term))
        if axis is None:
            return Fixed(term.size)
        if axis.name in own:
            return Units(axis.name, term.size, num_blocks=own[axis.name].num_blocks, own=own[axis.name].name)
        return Units(axis.name, term.size, axis.block, axis.num_blocks)
    experts = named.get(id(term.factors[-1])) if isinstance(term, Prod) and term.factors else None
    if experts is not None and experts.kind == "expert":
        return Units(experts.name, experts.num_units)  # of groups of experts, all of them
    children = [_freeze(child, named, own) for child in (term.factors if isinstance(term, Prod) else term.parts)]
    assert isinstance(term, (Prod, Cat))
    if all(isinstance(child, Fixed) for child in children):
        return Fixed(term.size)
    merged: list[Layout] = []
    for child in children:
        if isinstance(term, Cat) and merged and isinstance(child, Fixed) and isinstance(last := merged[-1], Fixed):
            merged[-1] = Fixed(last.length + child.length)
        else:
            merged.append(child)
    return Product(tuple(merged)) if isinstance(term, Prod) else Concat(tuple(merged))
