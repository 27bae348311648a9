"""Run a model one decoder layer at a time: hidden states between layers, and exact backward passes.

A model is run once with stand-ins for its layers, which record what it calls each with (rotary angles, masks, ALiBi).
From then on each layer is called with that, so the hidden states of a whole calibration set can go through one layer
before the next, and only that layer's weights need be in memory. Gradients are those of the whole model, bit for bit on
a CPU: the layer is run again from the hidden states that it was given, with gradients this time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from tqdm.auto import tqdm

from hf_prune.data import NO_LABEL
from hf_prune.errors import CalibrationError, ScoreError, StructureError
from hf_prune.layers.boundaries import Boundaries, is_large, on_disk
from hf_prune.layers.losses import CHUNK_ELEMENTS, divergence, next_token
from hf_prune.layers.processes import of_main_process, shard_batches
from hf_prune.layers.weights import evaluating, input_device, is_on_disk, resident
from hf_prune.layers.work import Results

if TYPE_CHECKING:
    from hf_prune.layers.work import WorkDir

Batch = Mapping[str, Tensor]
Found = dict[str, Tensor]
"""What a visit to a part of the model found."""
Visit = Callable[["Part"], Found]
Each = Callable[[int], AbstractContextManager[Any]]
"""Given the number of a batch, what is to be in force while it runs."""
EachLayer = Callable[[int, "int | None"], AbstractContextManager[Any]]
"""Given the number of a batch and the layer that runs (`None`: all of them), what is to be in force meanwhile."""
Consume = Callable[[str, Tensor], None]
"""Takes the gradient of a parameter, by name."""

PROBE_TOKENS = 8
"""Tokens of the one sample on which the layers are first run as usual."""
HEAD_TOLERANCE = 1e-2
"""Logits of the sample may differ by so much when they are computed from the last hidden states in pieces."""
HALF_SCALE = 2.0**16
"""Largest loss scale for float16, in which gradients near 1e-8 would vanish."""


class StopForward(Exception):  # noqa: N818  # not an error
    """Stops a forward pass once what was wanted of it is known."""


@dataclass
class LayerCall:
    """Arguments of a layer, but for the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class LayerProtocol:
    """How a model runs its layers, found by a probe."""

    outputs: tuple[Any, ...]
    """What each layer returned for the sample."""
    layered: bool
    """Whether the layers exchange hidden states and nothing else, so that they can be run one at a time."""
    reason: str
    """Why not; empty if they can."""


class Part:
    """What is visited at a time: one decoder layer, what is outside of the layers, or the whole model."""

    def __init__(self, walk: Walk, layer: int | None, whole: bool, run: Callable[[Each], None]) -> None:
        self.layer, self.whole, self._walk, self._run = layer, whole, walk, run

    def holds(self, name: str) -> bool:
        """Whether a parameter, or the module of a path, is in this part."""
        return self.whole or self._walk.layer_of(name) == self.layer

    def has_layer(self, layer: int) -> bool:
        """Whether a decoder layer is in this part."""
        return self.whole or self.layer == layer

    def run(self, each: Each | None = None) -> None:
        """Take all batches through the part: forward, or forward and backward."""
        self._run(each or _nothing)


class Outputs:
    """What a model gives for one batch: its last hidden states, from which logits are computed a chunk at a time."""

    def __init__(self, walk: Walk, ids: Tensor, hidden: Tensor | None, logits: Tensor | None) -> None:
        self._walk, self.ids, self._hidden, self._logits = walk, ids, hidden, logits

    def offloaded(self) -> Outputs:
        """The same with its tensor on the CPU."""
        hidden, logits = (None if x is None else x.cpu() for x in (self._hidden, self._logits))
        return Outputs(self._walk, self.ids, hidden, logits)

    def chunks(self) -> Iterator[tuple[int, int, Tensor]]:
        """`(row, first token, logits [tokens, V])`, in order."""
        for row, start, stop in self._walk.chunks(self.ids):
            yield row, start, self.logits(row, start, stop)

    def logits(self, row: int, start: int, stop: int) -> Tensor:
        """Logits `[tokens, V]` of some tokens of one sample."""
        if self._logits is not None:
            return self._logits[row, start:stop]
        assert self._hidden is not None
        return self._walk.head(self.ids[row : row + 1, start:stop], self._hidden[row : row + 1, start:stop])[0]


class Walk:
    """The decoder layers of one model, calibration batches, and the hidden states between the layers.

    In memory a model is run as a whole where nothing asks for single layers; on disk, layer by layer. Results are the
    same bits (float32 on a CPU).

    Args:
        model: a causal LM, in memory or on disk (see `open_model`); left as it was.
        layer_paths: module path of each decoder layer.
        batches: `input_ids` int64 `[B, T]` without padding; of several processes each walks its share. May be empty
            where no layer will be run. A sample with images is a batch of its own, with all that the model takes.
            Where there are `labels` `[B, T]`, tokens with the label -100 do not count in the loss.
        layered: run layer by layer also in memory; default: only on disk, or with a `work` directory.
        work: keeps what was found, so that an interrupted walk can be resumed.
        every: keep the hidden states before every so many layers only; those between are computed again.
        protocol: how the model runs its layers, if that is known.

    Raises:
        CalibrationError: a batch without tokens, or with padding.
    """

    def __init__(
        self,
        model: nn.Module,
        layer_paths: Sequence[str],
        batches: Sequence[Batch | Tensor] = (),
        *,
        layered: bool = False,
        work: WorkDir | None = None,
        every: int = 1,
        protocol: LayerProtocol | None = None,
    ) -> None:
        self.model, self.layer_paths, self.work, self.every = model, list(layer_paths), work, every
        own = [isinstance(batch, Tensor) and not batch.is_floating_point() for batch in batches]
        self.all_ids: list[Tensor] = [x if known else _own_ids(x) for x, known in zip(batches, own, strict=True)]  # type: ignore[misc, arg-type]
        self.ids = shard_batches(self.all_ids)
        self._images = {
            id(ids): images for ids, x in zip(self.all_ids, batches, strict=True) if (images := images_of(x))
        }
        self._labels = {
            id(ids): x["labels"]
            for ids, x in zip(self.all_ids, batches, strict=True)
            if isinstance(x, Mapping) and "labels" in x
        }
        self.hidden: list[Tensor] = []
        """Per batch the hidden states `[B, T, D]` before the next layer, on the CPU."""
        self.calls: list[list[LayerCall]] = []
        """Per batch one call per layer."""
        self.scale = 1.0
        """Factor on the loss in a backward pass: 1 unless the model is float16."""
        self.teachers: dict[int, Outputs] = {}
        """By the `id` of the tokens of a batch: another model's outputs, from which a backward pass takes the
        divergence as its loss, in place of that of the next tokens."""
        self.row: int | None = None
        """The sample of a batch whose logits are being computed."""
        self.look: Callable[[str], None] | None = None
        """Called by the probe with the path of each layer on disk while its weights are in memory."""
        self.loaded: Callable[[int], None] | None = None
        """Called with each layer whose weights have come into memory: may change those of a layer on disk."""
        self._wanted, self._layered = set[str](), layered or work is not None
        self._known = [] if protocol is None else [protocol]  # shared by walks over the same model
        self._consume: Consume = _drop
        self._boundaries: Boundaries | None = None
        self._gradients: list[Tensor] = []
        self._prefixes = {f"{path}.": layer for layer, path in enumerate(self.layer_paths)}

    # --- what there is ------------------------------------------------------------------------------------------------

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layer_paths)

    @property
    def num_samples(self) -> int:
        """Windows of all batches, of all processes."""
        return sum(len(ids) for ids in self.all_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens of all batches, of all processes."""
        return sum(ids.numel() for ids in self.all_ids)

    @property
    def has_images(self) -> bool:
        """Whether a sample has more than tokens."""
        return bool(self._images)

    def layer_of(self, name: str) -> int | None:
        """The decoder layer that a parameter or module is in, `None` for what is outside of the layers."""
        path = f"{name}."
        return next((layer for prefix, layer in self._prefixes.items() if path.startswith(prefix)), None)

    def over(self, batches: Sequence[Batch | Tensor]) -> Walk:
        """A walk over the same model with other batches."""
        return self._derived(batches, None)

    def through(self, model: nn.Module, layer_paths: Sequence[str], protocol: LayerProtocol) -> Walk:
        """A walk over another model with the same batches and their images, layer by layer."""
        walk = Walk(model, layer_paths, self.all_ids, layered=True, protocol=protocol)
        walk.ids, walk._images = self.ids, self._images
        return walk

    def per_sample(self) -> Walk:
        """The same walk with one window in each batch."""
        rows = [
            ids if len(ids) == 1 else {"input_ids": row[None], "labels": labels[None]}
            for ids in self.all_ids
            for row, labels in zip(ids, self._labels.get(id(ids), ids), strict=True)
        ]
        return self._derived(rows, self.work)

    def _derived(self, batches: Sequence[Batch | Tensor], work: WorkDir | None) -> Walk:
        walk = Walk(self.model, self.layer_paths, batches, layered=self._layered, work=work)
        walk._known = self._known
        walk._images |= self._images
        walk._labels |= self._labels
        return walk

    @property
    def protocol(self) -> LayerProtocol:
        """How the model runs its layers; probed once.

        Raises:
            CalibrationError: no batch to probe with.
        """
        if not self._known:
            if not self.all_ids:
                raise CalibrationError("found no calibration batch, expected one or more: give a calibration text.")
            self._known.append(_probe(self, self.all_ids[0][:1, :PROBE_TOKENS]))
        return self._known[0]

    def check_layered(self) -> None:
        """Raise `StructureError` if the layers cannot be run one at a time."""
        if not self.protocol.layered:
            raise StructureError(
                f"the decoder layers of {type(self.model).__name__} {self.protocol.reason}, expected only hidden "
                "states; they cannot be run one at a time, so the model cannot be repaired, nor be pruned from disk. "
                "Prune it in memory with repair='none'."
            )

    def call(self, ids: Tensor) -> Any:
        """What the model returns for the tokens of one batch, and for its images."""
        device = input_device(self.model)
        images = send_to_device(dict(self._images.get(id(ids), {})), device)
        return self.model(input_ids=ids.to(device), use_cache=False, **images)

    @contextlib.contextmanager
    def resident(self, layer: int) -> Iterator[None]:
        """Within, the weights of one layer are in memory."""
        with resident(self.model.get_submodule(self.layer_paths[layer])):
            if self.loaded is not None:
                self.loaded(layer)
            yield

    # --- forward ------------------------------------------------------------------------------------------------------

    def forward(self, visit: Visit, name: str, *, layered: bool = False, outside: bool = False) -> Found:
        """Take all batches through the model; `visit` sets its hooks, runs each part, and says what it found.

        Args:
            visit: called with each part in order; must run it once.
            name: of this pass, for the progress bar and the work directory.
            layered: visit layer by layer also in memory.
            outside: visit what is outside of the layers too, after them.

        Returns:
            What the visits found; tensors of the same name are added up.
        """
        with torch.no_grad(), evaluating(self.model):
            if not self._by_layers(layered):
                return _merged([visit(Part(self, None, True, partial(self._run_whole, name, outside)))])
            results = self._results(name)
            self.start()
            self.hidden = results.state or self.hidden
            for layer in self._bar(range(results.done, self.num_layers), name):
                with self.resident(layer):
                    found = visit(Part(self, layer, False, partial(self._run_layer, layer)))
                results.put(found, self.hidden)
            if outside and results.done == self.num_layers:
                results.put(visit(Part(self, None, False, self._run_outside)), [])
            return _merged(results.found)

    def outputs(
        self, each: EachLayer | None = None, begins: Sequence[tuple[int, Tensor]] | None = None
    ) -> Iterator[Outputs]:
        """What the model gives for each batch; on disk all batches go through a layer before the next.

        Args:
            each: what is to be in force while a batch runs, as masks.
            begins: for each batch the layer with which it begins, and the hidden states before that; layer by layer
                then, as on disk.
        """
        each = each or _nothing_each
        if begins is None and not self._by_layers(False):
            for batch, ids in enumerate(self.ids):
                with each(batch, None):
                    yield self._whole_outputs(ids)
            return
        self.start()
        firsts = [0] * len(self.ids) if begins is None else [first for first, _ in begins]
        if begins is not None:
            self.hidden = [hidden for _, hidden in begins]
        for layer in range(min(firsts, default=0), self.num_layers):
            with self.resident(layer):
                self._run_layer(layer, partial(_of_layer, each, layer), [first <= layer for first in firsts])
        yield from map(self.outputs_of, self.ids, self.hidden)

    def outputs_of(self, ids: Tensor, hidden: Tensor) -> Outputs:
        """What the model gives for one batch, from its last hidden states."""
        return Outputs(self, ids, hidden, None)

    def boundaries(self, name: str) -> Boundaries:
        """The hidden states before every layer and after the last; where they are large, on disk."""
        with evaluating(self.model):
            return self._all_boundaries(name)

    def start(self) -> None:
        """Put the first hidden states in place, and find what the layers are called with for each batch.

        Raises:
            StructureError: the layers exchange more than hidden states.
        """
        self.check_layered()
        self.hidden, self.calls = [], []
        for ids in self.ids:
            hidden, calls = _calls(self, self.protocol.outputs, ids)
            if self.calls and all(_same(own, other) for own, other in zip(calls, self.calls[-1], strict=True)):
                calls = self.calls[-1]  # windows of one length are called alike: hold masks and angles once
            self.hidden.append(self.held(hidden.detach()))
            self.calls.append(calls)

    def run(self, layer: int, batch: int, hidden: Tensor) -> Tensor:
        """Output hidden states of one layer, on the CPU."""
        return self.held(self.output(layer, batch, hidden))

    def output(self, layer: int, batch: int, hidden: Tensor, at_least: torch.dtype | None = None) -> Tensor:
        """Output hidden states of one layer, where it is; given halves `at_least` so wide, for weights that are."""
        module = self.model.get_submodule(self.layer_paths[layer])
        device = input_device(module)
        call = self.calls[batch][layer]
        args, kwargs = send_to_device((call.args, call.kwargs), device)
        hidden = hidden.to(device, copy=True)  # some layers add to it in place
        if at_least is not None:
            hidden, args, kwargs = tree_map_only(Tensor, partial(_widened, at_least), (hidden, args, kwargs))
        return hidden_of(module(hidden, *args, **kwargs))

    def held(self, values: Tensor, *, copy: bool = False) -> Tensor:
        """What is to be kept of one batch, on the CPU: in a temporary file where the batches together are large."""
        return on_disk(values) if is_large(values, len(self.ids)) else values.to("cpu", copy=copy)

    def head(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Logits `[B, T, V]` from last hidden states `[B, T, D]`, by the model's own code; keeps gradients."""
        device = input_device(self.model)
        first = hidden.detach()  # never looked at
        last = hidden.to(device).clone()
        with contextlib.ExitStack() as stack:
            for layer, path in enumerate(self.layer_paths):
                give = partial(_return, self.protocol.outputs[layer], last if layer == self.num_layers - 1 else first)
                stack.enter_context(replaced_forward(self.model.get_submodule(path), give))
            logits: Tensor = self.model(input_ids=ids.to(device), use_cache=False).logits
        return logits

    def chunks(self, ids: Tensor) -> Iterator[tuple[int, int, int]]:
        """`(row, first token, end)` of pieces of a batch `[B, T]` whose logits are few enough to hold."""
        embedding: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        step = max(1, CHUNK_ELEMENTS // len(embedding.weight))
        for row in range(len(ids)):
            for start in range(0, ids.shape[1], step):
                yield row, start, min(start + step, ids.shape[1])

    def _run_layer(self, layer: int, each: Each, running: Sequence[bool] | None = None) -> None:
        for batch, hidden in enumerate(self.hidden):
            if running is None or running[batch]:
                with each(batch):
                    self.hidden[batch] = self.run(layer, batch, hidden)

    def _run_outside(self, each: Each) -> None:
        for batch, (ids, hidden) in enumerate(zip(self.ids, self.hidden, strict=True)):
            with each(batch):
                for row, start, stop in self.chunks(ids):
                    self.head(ids[row : row + 1, start:stop], hidden[row : row + 1, start:stop])

    def _run_whole(self, name: str, outside: bool, each: Each) -> None:
        for batch, ids in enumerate(self._bar(self.ids, name, "batch")):
            with each(batch):
                outputs = self._whole_outputs(ids)
                for _ in outputs.chunks() if outside and self.protocol.layered else ():
                    pass

    def _whole_outputs(self, ids: Tensor) -> Outputs:
        """Run a model in memory as it is."""
        if not self.protocol.layered:
            return Outputs(self, ids, None, self.call(ids).logits)
        return Outputs(self, ids, self._last_hidden(ids), None)

    def _last_hidden(self, ids: Tensor) -> Tensor:
        """Run the model up to its last layer, and stop there."""
        found: list[Tensor] = []

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            found.append(hidden_of(output))
            raise StopForward

        handle = self.model.get_submodule(self.layer_paths[-1]).register_forward_hook(stop)
        try:
            with contextlib.suppress(StopForward):
                self.call(ids)
        finally:
            handle.remove()
        return found[0]

    # --- backward -----------------------------------------------------------------------------------------------------

    def backward(
        self,
        visit: Visit,
        name: str,
        *,
        wanted: Sequence[str] = (),
        consume: Consume | None = None,
        layered: bool = False,
        outside: bool = False,
    ) -> Found:
        """Backward passes of the loss of all batches; `visit` as for `forward`, from the last part to the first.

        The loss is the sum over the samples of their mean next-token losses, so that gradients of batches add up; a
        mean is over the tokens that have a label.

        Args:
            visit: called with each part, from the last layer to the first, then perhaps with what is outside of them;
                running a part computes it with gradients of activations.
            name: of this pass, for the progress bar and the work directory.
            wanted: names of parameters whose gradients are wanted.
            consume: gets each gradient once per batch, as soon as it is ready; float32 unless the parameter is
                bfloat16. It is dropped afterwards.
            layered: visit layer by layer also in memory.
            outside: visit what is outside of the layers; done anyway where any of `wanted` is there.

        Raises:
            ScoreError: the loss is not finite.
        """
        self._wanted, self._consume = set(wanted), consume or _drop
        self._check_windows()
        by_layers = self._by_layers(layered)
        with self._differentiable(checkpointing=not by_layers):
            self.scale = self._loss_scale()
            if not by_layers:
                return _merged([visit(Part(self, None, True, partial(self._back_whole, name)))])
            return self._back_layers(visit, name, outside)

    def _back_layers(self, visit: Visit, name: str, outside: bool = False) -> Found:
        results = self._results(name)
        outside = outside or any(self.layer_of(known) is None for known in self._wanted)
        if results.done < self.num_layers + outside:
            self._boundaries = self._all_boundaries(f"{name}: forward")
            self._gradients = results.state or [
                self._head_backward(ids, last, {})
                for ids, last in zip(self.ids, self._boundaries.get(self.num_layers), strict=True)
            ]
            for layer in self._bar(range(self.num_layers - 1 - results.done, -1, -1), name):
                with self.resident(layer):
                    found = visit(Part(self, layer, False, partial(self._back_layer, layer)))
                results.put(found, self._gradients)
            if outside:
                results.put(visit(Part(self, None, False, self._back_outside)), [])
        self._gradients, self._boundaries = [], None
        return _merged(results.found)

    def _all_boundaries(self, name: str) -> Boundaries:
        """The hidden states before every layer and after the last."""
        with torch.no_grad():
            self.start()
            folder = None if self.work is None else self.work.stage("boundaries").path
            found = Boundaries(self.hidden, self.num_layers, self.every, self._run_layers, folder)
            first, self.hidden = found.latest()
            for layer in self._bar(range(first, self.num_layers), name):
                with self.resident(layer):
                    self._run_layer(layer, _nothing)
                found.put(layer + 1, self.hidden)
        return found

    def _run_layers(self, layers: range, hidden: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """The hidden states after each of `layers`, from those before the first."""
        self.hidden = list(hidden)
        for layer in layers:
            with torch.no_grad(), self.resident(layer):
                self._run_layer(layer, _nothing)
            yield list(self.hidden)

    def _back_layer(self, layer: int, each: Each) -> None:
        module = self.model.get_submodule(self.layer_paths[layer])
        device = input_device(module)
        assert self._boundaries is not None
        wanted = [name for name in self._wanted if self.layer_of(name) == layer]
        with self._consuming(wanted):
            for batch, hidden in enumerate(self._boundaries.get(layer)):
                call = self.calls[batch][layer]
                args, kwargs = send_to_device((call.args, call.kwargs), device)
                before = hidden.to(device, copy=True).requires_grad_()
                with each(batch):
                    after = hidden_of(module(before.clone(), *args, **kwargs))
                    after.backward(self._gradients[batch].to(after.device))  # type: ignore[no-untyped-call]
                assert before.grad is not None
                self._gradients[batch] = self.held(before.grad)

    def _back_outside(self, each: Each) -> None:
        """Gradients of what is outside of the layers: of the head and the embeddings, which may be one tensor."""
        assert self._boundaries is not None
        last = self._boundaries.get(self.num_layers)
        for batch, ids in enumerate(self.ids):
            with each(batch):
                outside = self._outside()
                self._head_backward(ids, last[batch], outside)
                if any(parameter.requires_grad for parameter in outside.values()):
                    hidden, _ = _calls(self, self.protocol.outputs, ids)
                    if hidden.requires_grad:
                        hidden.backward(self._gradients[batch].to(hidden.device))  # type: ignore[no-untyped-call]
                self._hand_over(outside)

    def _back_whole(self, name: str, each: Each) -> None:
        outside = self._outside()
        with self._consuming([name for name in self._wanted if self.layer_of(name) is not None]):
            for batch, ids in enumerate(self._bar(self.ids, name, "batch")):
                with each(batch):
                    if self.protocol.layered:
                        hidden = self._last_hidden(ids)
                        gradient = self._head_backward(ids, hidden.detach(), outside)
                        hidden.backward(gradient.to(hidden.device))  # type: ignore[no-untyped-call]
                        del hidden  # and its graph, whose hooks hold inputs
                    else:
                        logits = self.call(ids).logits
                        labels = self._labels.get(id(ids), ids)[:, 1:]
                        self._loss_of(next_token(logits[:, :-1], labels), labels).backward()  # type: ignore[no-untyped-call]
                    self._hand_over(outside)

    def _head_backward(self, ids: Tensor, hidden: Tensor, outside: Mapping[str, nn.Parameter]) -> Tensor:
        """Gradient of the loss by last hidden states, on the CPU, and by parameters `outside`; logits in chunks."""
        muted = [] if outside else list(self._outside().values())
        for parameter in muted:
            parameter.requires_grad_(False)
        try:
            gradient = torch.zeros_like(hidden, device="cpu")
            labels = self._labels.get(id(ids), ids)[:, 1:]
            for row, start, stop in self.chunks(ids):
                end = min(stop, ids.shape[1] - 1)
                if start >= end:
                    continue
                leaf = hidden[row : row + 1, start:end].detach().clone().requires_grad_()
                self.row = row
                logits = self.head(ids[row : row + 1, start:end], leaf)
                if (teacher := self.teachers.get(id(ids))) is None:
                    losses = next_token(logits, labels[row : row + 1, start:end])
                else:
                    with torch.no_grad():
                        wanted = teacher.logits(row, start, end)
                    losses = divergence(wanted, logits)
                self._loss_of(losses, labels[row : row + 1]).backward()  # type: ignore[no-untyped-call]
                self.row = None
                assert leaf.grad is not None
                gradient[row : row + 1, start:end] = leaf.grad.cpu()
            return gradient
        finally:
            for parameter in muted:
                parameter.requires_grad_()

    def _loss_of(self, losses: Tensor, labels: Tensor) -> Tensor:
        """Losses of tokens as their part of the sum over the samples `labels` `[B, T - 1]` of mean losses, scaled."""
        counts = (labels != NO_LABEL).sum(1).to(losses)
        loss = (losses.sum(1) * (self.scale / counts)).sum()
        if not bool(loss.isfinite()):
            raise ScoreError(
                f"the calibration loss is {loss.item()}, expected a finite number. "
                "Score in bfloat16 or float32, and check that the dense model works."
            )
        return loss

    def _outside(self) -> dict[str, nn.Parameter]:
        """Wanted parameters outside of the layers."""
        names = [name for name in self._wanted if self.layer_of(name) is None]
        return {name: self.model.get_parameter(name) for name in sorted(names)}

    def _hand_over(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                self._consume(name, gradient if self.scale == 1.0 else gradient.float() / self.scale)

    @contextlib.contextmanager
    def _consuming(self, names: Sequence[str]) -> Iterator[None]:
        """Within, gradients of these parameters are handed over the moment they are ready."""
        with contextlib.ExitStack() as stack:
            for name in names:
                parameter = self.model.get_parameter(name)
                hook = partial(_take, self, name)
                stack.callback(parameter.register_post_accumulate_grad_hook(hook).remove)  # type: ignore[no-untyped-call]
            yield

    @contextlib.contextmanager
    def _differentiable(self, checkpointing: bool) -> Iterator[None]:
        """Within, only the wanted parameters need gradients, and activations do; afterwards all is as before.

        Gradient checkpointing, if the caller enabled it on the model, stays on for a whole model although its layers
        only use it in training mode: the flag is set on the layers themselves, not on what they contain (dropout).
        """
        model = self.model
        flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        wanted = {id(model.get_parameter(name)) for name in self._wanted}
        with contextlib.ExitStack() as stack:
            stack.enter_context(evaluating(model))
            stack.enter_context(torch.enable_grad())
            for module in model.modules():
                if checkpointing and getattr(module, "gradient_checkpointing", False) is True:
                    module.training = True
            embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
            if not is_on_disk(model):
                stack.callback(embedding.register_forward_hook(_need_gradient).remove)
            try:
                for parameter in model.parameters():
                    parameter.requires_grad_(id(parameter) in wanted)
                    parameter.grad = None
                yield
            finally:
                for name, parameter in model.named_parameters():
                    parameter.requires_grad_(flags[name])
                    parameter.grad = grads[name]

    def _loss_scale(self) -> float:
        """Factor on the loss with which no gradient overflows or vanishes: 1 unless the model is float16."""
        if not any(parameter.dtype == torch.float16 for parameter in self.model.parameters()):
            return 1.0
        scale = HALF_SCALE
        while self._wanted and scale > 1.0:
            trial = self.over([self.all_ids[0][:1]])
            overflows = [False]
            trial._wanted, trial.scale = self._wanted, scale
            trial._consume = partial(_note_overflow, overflows)
            run = trial._back_layers if is_on_disk(self.model) or self._layered else trial._trial_whole
            run(_only_run, "loss scale")
            if not of_main_process(overflows[0]):
                return scale / 8  # a margin for the other samples
            scale /= 4
        return min(scale, HALF_SCALE / 64)

    def _trial_whole(self, visit: Visit, name: str) -> Found:
        return visit(Part(self, None, True, partial(self._back_whole, name)))

    # --- else ---------------------------------------------------------------------------------------------------------

    def _by_layers(self, asked: bool) -> bool:
        """Whether to go layer by layer. Probes the model, before any hook is set."""
        if is_on_disk(self.model):
            self.check_layered()
        return self.protocol.layered and (asked or self._layered or is_on_disk(self.model))

    def _check_windows(self) -> None:
        if any(ids.shape[1] < 2 for ids in self.all_ids):
            raise CalibrationError(
                "found windows of 1 token, expected 2 or more: a token is predicted from earlier ones."
            )

    def _bar(self, items: Any, name: str, unit: str = "layer") -> Any:
        return tqdm(items, desc=name, unit=unit, leave=False)

    def _results(self, name: str) -> Results:
        return Results(None if self.work is None else self.work.stage(name))


def checked_ids(batch: Batch) -> Tensor:
    """The `input_ids` `[B, T]` of a batch; `CalibrationError` if it has none, or padding, or labels of no use."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.numel() == 0:
        found = tuple(ids.shape) if isinstance(ids, Tensor) else type(batch).__name__
        raise CalibrationError(
            f"a calibration batch is {{'input_ids': int64 [B, T]}} with tokens in it, found {found}."
        )
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise CalibrationError(f"a calibration batch holds input_ids of {ids.dtype}, expected whole numbers (int64).")
    mask = batch.get("attention_mask")
    if mask is not None and not bool(mask.all()):
        raise CalibrationError("a calibration batch holds padding; give windows of equal length without padding.")
    labels = batch.get("labels")
    if labels is not None and (labels.shape != ids.shape or bool((labels[:, 1:] == NO_LABEL).all(1).any())):
        raise CalibrationError(
            f"a calibration batch holds labels {tuple(labels.shape)} for input_ids {tuple(ids.shape)}, or a sample "
            f"whose labels are all {NO_LABEL}; give each sample a token to predict, or no labels."
        )
    if len(ids) > 1 and images_of(batch):
        raise CalibrationError(
            f"a calibration batch holds {len(ids)} samples with {', '.join(images_of(batch))}, expected one: give each "
            "sample with images as a batch of its own."
        )
    return ids


def _own_ids(batch: Batch) -> Tensor:
    """Samples may share a tensor of tokens, with other images or labels, which go by the tensor's identity."""
    ids = checked_ids(batch)
    return ids.view(ids.shape)


def images_of(batch: Batch | Tensor) -> dict[str, Any]:
    """What a batch holds beside its tokens, if it holds images; they say nothing of text."""
    if not isinstance(batch, Mapping) or not any("pixel" in name or "image" in name for name in batch):
        return {}
    return {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask", "labels")}


@contextlib.contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Temporarily replace what `module` computes."""
    own = module.__dict__.get("forward")  # accelerate sets one on modules that it moves
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own


def hidden_of(output: Any) -> Tensor:
    """The hidden states of what a module returned: itself, or the first of several."""
    result: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return result


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """`output` with other hidden states."""
    return type(output)((hidden, *output[1:])) if isinstance(output, (tuple, list)) else hidden


@torch.no_grad()
def _probe(walk: Walk, ids: Tensor) -> LayerProtocol:
    """Run the model as usual on a few tokens: what the layers return, and whether they can be run one by one."""
    inputs: list[Tensor] = []
    arguments: list[LayerCall] = []
    outputs: list[Any] = []
    model = walk.model

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, call = _split(args, kwargs)
        inputs.append(hidden.cpu())
        arguments.append(call)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs.append(output)

    with evaluating(model), contextlib.ExitStack() as stack:
        for path in walk.layer_paths:
            layer = model.get_submodule(path)
            if walk.look is not None:
                own = getattr(layer, "_old_forward", layer.forward)
                stack.enter_context(replaced_forward(layer, partial(_looked_at, partial(walk.look, path), layer, own)))
            stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(after).remove)
        logits = walk.call(ids).logits
    found = LayerProtocol(tuple(outputs), False, "hand on more than hidden states")
    ran_in_order = len(inputs) == walk.num_layers and hidden_of(outputs[-1]).shape[:-1] == ids.shape
    ran_in_order = ran_in_order and all(
        _equal(hidden_of(output), hidden) for output, hidden in zip(outputs[:-1], inputs[1:], strict=True)
    )
    if not ran_in_order:
        return found
    with evaluating(model):
        _, calls = _calls(walk, outputs, ids)
        if not all(_same(call, known) for call, known in zip(arguments, calls, strict=True)):
            return found
        layered = LayerProtocol(tuple(outputs), True, "")
        trial = Walk(model, walk.layer_paths, protocol=layered)
        last, half = hidden_of(outputs[-1]), -(-ids.shape[1] // 2)
        parts = [
            trial.head(ids[:, cut], last[:, cut]) for cut in (slice(half), slice(half, None)) if ids[:, cut].numel()
        ]
    close = torch.isclose(torch.cat(parts, 1).float(), logits.float(), rtol=HEAD_TOLERANCE, atol=HEAD_TOLERANCE)
    if bool((close | logits.isnan()).all()):
        return layered
    return LayerProtocol(tuple(outputs), False, "leave more to the output embeddings than the last hidden states")


def _calls(walk: Walk, outputs: Sequence[Any], ids: Tensor) -> tuple[Tensor, list[LayerCall]]:
    """The first hidden states and what the layers are called with, while none of them computes anything."""
    model, layer_paths = walk.model, walk.layer_paths
    start: list[Tensor] = []
    calls: list[LayerCall] = []

    def stand_in(layer: int, *args: Any, **kwargs: Any) -> Any:
        hidden, call = _split(args, kwargs)
        start[:] = start or [hidden]
        if hidden is not start[0] and not _equal(hidden, start[0]):
            raise StructureError(
                f"images change the hidden states between the decoder layers of {type(model).__name__}, so that these "
                "cannot be run one at a time: calibrate with text, or prune in memory with repair='none'."
            )
        calls.append(call)
        if layer == len(layer_paths) - 1:
            raise StopForward
        return with_hidden(outputs[layer], hidden)

    with contextlib.ExitStack() as stack:
        for index, path in enumerate(layer_paths):
            stack.enter_context(replaced_forward(model.get_submodule(path), partial(stand_in, index)))
        with contextlib.suppress(StopForward):
            walk.call(ids)
    return start[0], calls


def _looked_at(look: Callable[[], None], layer: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    with resident(layer):
        look()
        return forward(*args, **kwargs)


def _widened(dtype: torch.dtype, values: Tensor) -> Tensor:
    narrow = values.is_floating_point() and values.dtype.itemsize < dtype.itemsize
    return values.to(dtype) if narrow else values


def _return(output: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    return with_hidden(output, hidden)


def _take(walk: Walk, name: str, parameter: nn.Parameter) -> None:
    walk._hand_over({name: parameter})


def _note_overflow(overflows: list[bool], name: str, gradient: Tensor) -> None:
    overflows[0] = overflows[0] or not bool(gradient.isfinite().all())


def _only_run(part: Part) -> Found:
    part.run()
    return {}


def _nothing(batch: int) -> AbstractContextManager[None]:
    return contextlib.nullcontext()


def _nothing_each(batch: int, layer: int | None) -> AbstractContextManager[None]:
    return contextlib.nullcontext()


def _of_layer(each: EachLayer, layer: int, batch: int) -> AbstractContextManager[Any]:
    return each(batch, layer)


def _drop(name: str, gradient: Tensor) -> None:
    """Take no notice of a gradient."""


def _need_gradient(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return output if output.requires_grad else output.requires_grad_()


def _merged(found: Sequence[Found]) -> Found:
    """Tensors of the same name are added up."""
    result: Found = {}
    for part in found:
        for name, values in part.items():
            result[name] = result[name] + values if name in result else values
    return result


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, LayerCall]:
    """The hidden states, and the rest: `Walk.run` gives them as the first argument."""
    if args:
        return args[0], LayerCall(args[1:], dict(kwargs))
    rest = dict(kwargs)
    return rest.pop("hidden_states"), LayerCall((), rest)


def _same(call: LayerCall, other: LayerCall) -> bool:
    """Whether all tensors of two calls are equal."""
    left, right = ([x for x in tree_leaves((c.args, c.kwargs)) if isinstance(x, Tensor)] for c in (call, other))
    return len(left) == len(right) and all(a is b or _equal(a, b) for a, b in zip(left, right, strict=True))


def _equal(left: Tensor, right: Tensor) -> bool:
    left, right = left.cpu(), right.cpu()
    return left.shape == right.shape and bool(((left == right) | (left != left)).all())  # NaN is reported later
