"""Many masks in one forward pass: every row is computed as the model under its own mask alone."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from models import FAMILIES, logits, make_plan, random_kept, shared_model, shared_structure, tiny_model, token_ids

from hf_prune.config import PolicyGradientConfig
from hf_prune.errors import StructureError
from hf_prune.layers.masking import keep_mask, masked, masked_rows
from hf_prune.layers.walk import Walk
from hf_prune.scores.policy_gradient.forward import open_model
from hf_prune.scores.policy_gradient.policy import find_units
from hf_prune.structure.inference import infer_structure


def row_masks(structure, plans, axes):
    """Axis → bool `[rows, num_units]` that says what the plans say."""
    found = {}
    for name in axes:
        total = structure.axes[name].num_units
        found[name] = torch.stack(
            [keep_mask(total, plan.kept_indices.get(name, tuple(range(total)))) for plan in plans]
        )
    return found


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mixtral"])
def test_rows_are_masked_each_by_its_own_mask(family):
    model, structure = shared_model(family), shared_structure(family)
    rng = random.Random(0)
    axes = [a.name for a in structure.axes.values() if a.prunable and a.kind in ("attention", "mlp")]
    last = len(structure.layer_paths) - 1
    plans = [make_plan(structure, random_kept(structure, rng, ("attention", "mlp"))) for _ in range(3)]
    layers = tuple(range(last))
    layer_axes = [name for name in ("layers.attention", "layers.mlp", "layers") if structure.axes[name].prunable]
    plans += [make_plan(structure, {name: layers}) for name in layer_axes]
    ids = token_ids(len(plans), seed=3)
    dense = logits(model, ids)
    with masked_rows(model, structure, axes + layer_axes) as masks:
        assert torch.equal(logits(model, ids), dense), "no mask is set yet"
        masks.update(row_masks(structure, plans, axes + layer_axes))
        found = logits(model, ids)
    for row, plan in enumerate(plans):
        with masked(model, structure, plan):
            expected = logits(model, ids[row : row + 1])
        assert (found[row] - expected).abs().max() <= 1e-9 * expected.abs().max()
        assert (found[row] - dense[row]).abs().max() > 1e-4 * dense.abs().max()
    assert torch.equal(logits(model, ids), dense)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_mask_may_cover_several_rows():
    model, structure = shared_model("llama"), shared_structure("llama")
    mask = torch.rand(2, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    ids = token_ids(6)
    with masked_rows(model, structure, ["layers.1.mlp"]) as masks:
        masks["layers.1.mlp"] = mask
        found = logits(model, ids)
        masks["layers.1.mlp"] = mask.repeat_interleave(3, 0)
        assert torch.equal(found, logits(model, ids))
        masks["layers.1.mlp"] = mask.repeat(3, 1)
        assert not torch.allclose(found, logits(model, ids))


@pytest.mark.parametrize(("family", "axis"), [("mixtral", "layers.0.mlp"), ("llama", "hidden")])
def test_axes_that_rows_cannot_mask_are_refused(family, axis):
    with pytest.raises(StructureError, match=axis), masked_rows(shared_model(family), shared_structure(family), [axis]):
        pass
    assert not any(module._forward_pre_hooks for module in shared_model(family).modules())


@pytest.mark.parametrize("reward", ["lm", "kl"])
@pytest.mark.parametrize("windows_per_mask", [1, 3])
def test_losses_are_those_of_one_mask_at_a_time(reward, windows_per_mask):
    model, structure = tiny_model("llama", dtype=torch.float32), shared_structure("llama")
    config = PolicyGradientConfig(0.3, axes=("mlp", "attention", "layer_mlp"))
    units = find_units(structure, config, torch.device("cpu"))
    windows = token_ids(6, length=11, seed=5)
    masks = torch.rand(6 // windows_per_mask, 4, len(units.costs), generator=torch.Generator().manual_seed(1)) < 0.7
    with open_model(Walk(model, structure.layer_paths), structure, units, reward=reward, forward_rows=7) as run:
        found = run.losses(windows, masks, windows_per_mask)
    dense = logits(model, windows)
    for group, own in enumerate(masks):
        ids = windows[group * windows_per_mask : (group + 1) * windows_per_mask]
        for k, mask in enumerate(own):
            with masked_rows(model, structure, [axis.name for axis in units.axes]) as current:
                current.update({name: part[None] for name, part in units.split(mask).items()})
                scores = logits(model, ids)
            if reward == "lm":
                expected = F.cross_entropy(scores[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            else:
                target = dense[group * windows_per_mask : (group + 1) * windows_per_mask].log_softmax(-1)
                expected = F.kl_div(scores.log_softmax(-1), target, log_target=True, reduction="sum") / ids.numel()
            assert found[group, k].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt"])
@pytest.mark.parametrize("reward", ["lm", "kl"])
def test_sliced_forwards_give_the_losses_of_masked_ones(family, reward):
    model = copy.deepcopy(shared_model(family))
    structure = shared_structure(family)
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    units = find_units(structure, PolicyGradientConfig(0.3), torch.device("cpu"))
    windows = token_ids(4, length=8, seed=2)
    masks = torch.rand(2, 2, len(units.costs), generator=torch.Generator().manual_seed(1)) < 0.6
    found = []
    for sliced in (False, True):
        with open_model(
            Walk(model, structure.layer_paths), structure, units, reward=reward, sliced_forward=sliced
        ) as run:
            assert bool(run._sliced) == (sliced and family != "gpt2")  # Conv1D keeps its size in an attribute
            found.append(run.losses(windows, masks, 2))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)
    for name, parameter in model.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_bfloat16_models_have_float32_losses_near_the_exact_ones():
    windows = token_ids(2, length=12)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model("qwen3", dtype=dtype)
        structure = infer_structure(model)
        units = find_units(structure, PolicyGradientConfig(0.3), torch.device("cpu"))
        masks = torch.rand(2, 2, len(units.costs), generator=torch.Generator().manual_seed(1)) < 0.6
        with open_model(Walk(model, structure.layer_paths), structure, units, reward="lm") as run:
            found.append(run.losses(windows, masks, 1))
        assert found[-1].dtype == torch.float32
    assert torch.allclose(found[0], found[1], rtol=0.05)
    assert not torch.equal(found[0], found[1])
