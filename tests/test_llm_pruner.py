"""LLM-Pruner against a slow reference: plain autograd, the slices of every unit written out by hand."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from accelerate import dispatch_model
from models import tiny_model

from hf_prune.allocation import allocate
from hf_prune.config import LLMPrunerConfig
from hf_prune.errors import CalibrationError, ConfigError, ScoreError
from hf_prune.scores import score
from hf_prune.structure.inference import infer_structure
from hf_prune.surgery.pruning import apply_plan

CRITERIA = ("vector", "first_order", "second_order", "mixed")
AGGREGATIONS = ("sum", "mean", "max", "product", "last", "first")


def samples(num_samples=4, seq_len=7, batch_size=4, seed=1):
    ids = torch.randint(0, 96, (num_samples, seq_len), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": part} for part in ids.split(batch_size)]


def block(start, size):
    return slice(start * size, (start + 1) * size)


def llama_groups(model, layer, heads, kv, dim):
    """Unit → [(parameter name, index)] of attention, in the order of the model; then of the MLP."""
    p, g = f"model.layers.{layer}.", heads // kv
    attention = [
        [
            (p + "self_attn.q_proj.weight", (block(u, g * dim),)),
            (p + "self_attn.k_proj.weight", (block(u, dim),)),
            (p + "self_attn.v_proj.weight", (block(u, dim),)),
            (p + "self_attn.o_proj.weight", (slice(None), block(u, g * dim))),
        ]
        for u in range(kv)
    ]
    mlp = [
        [
            (p + "mlp.gate_proj.weight", (u,)),
            (p + "mlp.up_proj.weight", (u,)),
            (p + "mlp.down_proj.weight", (slice(None), u)),
        ]
        for u in range(model.config.intermediate_size)
    ]
    return attention, mlp


def phi3_groups(model, layer, heads, kv, dim):
    p, g, i = f"model.layers.{layer}.", heads // kv, model.config.intermediate_size
    attention = []
    for u in range(kv):
        rows = [*range(u * g * dim, (u + 1) * g * dim)]
        rows += [*range(heads * dim + u * dim, heads * dim + (u + 1) * dim)]
        rows += [*range((heads + kv) * dim + u * dim, (heads + kv) * dim + (u + 1) * dim)]
        attention.append(
            [
                (p + "self_attn.o_proj.weight", (slice(None), block(u, g * dim))),
                (p + "self_attn.qkv_proj.weight", (rows,)),
            ]
        )
    mlp = [
        [(p + "mlp.gate_up_proj.weight", ([u, u + i],)), (p + "mlp.down_proj.weight", (slice(None), u))]
        for u in range(i)
    ]
    return attention, mlp


def gpt2_groups(model, layer, heads, kv, dim):
    p = f"transformer.h.{layer}."
    attention = []
    for u in range(heads):
        columns = [part * heads * dim + u * dim + e for part in range(3) for e in range(dim)]
        attention.append(
            [
                (p + "attn.c_attn.weight", (slice(None), columns)),
                (p + "attn.c_attn.bias", (columns,)),
                (p + "attn.c_proj.weight", (block(u, dim),)),
            ]
        )
    mlp = [
        [(p + "mlp.c_fc.weight", (slice(None), u)), (p + "mlp.c_fc.bias", (u,)), (p + "mlp.c_proj.weight", (u,))]
        for u in range(model.config.n_inner)
    ]
    return attention, mlp


FAMILIES = {
    "llama": (llama_groups, 6, 3, 10),  # GQA
    "llama_tied": (llama_groups, 6, 2, 10),
    "phi3": (phi3_groups, 6, 3, 8),  # fused qkv and gate_up
    "gpt2": (gpt2_groups, 5, 5, 8),  # MHA, Conv1D, fused, biases
}


def sample_gradients(model, batches):
    """`g_n` of every parameter, one backward pass per sample."""
    result = []
    for batch in batches:
        for row, labels in zip(batch["input_ids"], batch.get("labels", batch["input_ids"]), strict=True):
            model.zero_grad()
            model(input_ids=row[None], labels=labels[None]).loss.backward()
            result.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    return result


def reference(model, groups, gradients, criterion, aggregation, normalisation="mean"):
    weights = dict(model.named_parameters())
    n = len(gradients)
    scores = []
    for members in groups:
        found = []
        for name, index in members:
            w = weights[name].detach()
            g = sum(one[name] for one in gradients) / n
            f = sum(one[name] ** 2 for one in gradients) / (n if normalisation == "mean" else 1)
            salience = {
                "vector": w * g,
                "first_order": (w * g).abs(),
                "second_order": w**2 * f,
                "mixed": (w * g - 0.5 * w**2 * f).abs(),
            }[criterion]
            if criterion == "vector":  # |sum| of each row or column of the unit
                rest = [dim for dim in range(salience.dim()) if dim != len(index) - 1]
                line = salience.sum(rest) if rest else salience
                found.append(line[index[-1]].abs().sum())
            else:
                found.append(salience[index].sum())
        found = torch.stack(found)
        last = found[-1] if "o_proj" not in members[0][0] else found[0]  # phi3 has o_proj first
        scores.append(
            {
                "sum": found.sum(),
                "mean": found.mean(),
                "max": found.max(),
                "product": found.double().prod() ** (1 / len(found)),
                "last": last,
                "first": found[0],
            }[aggregation].float()
        )
    return torch.stack(scores)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    model = tiny_model(request.param)
    batches = samples()
    return request.param, model, infer_structure(model), batches, sample_gradients(model, batches)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_equal_the_reference(case, criterion):
    name, model, structure, batches, gradients = case
    groups, heads, kv, dim = FAMILIES[name]
    for aggregation in AGGREGATIONS:
        config = LLMPrunerConfig(0.5, criterion=criterion, aggregation=aggregation)
        scores = score(model, structure, config, batches)
        for layer in (0, 1):
            for branch, units in zip(("attention", "mlp"), groups(model, layer, heads, kv, dim), strict=True):
                expected = reference(model, units, gradients, criterion, aggregation)
                torch.testing.assert_close(scores[f"layers.{layer}.{branch}"], expected, rtol=2e-4, atol=1e-8)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_tokens_without_a_label_do_not_count(criterion):
    """Each sample's loss is the mean over those that have one, whatever their number."""
    model, batches = tiny_model("llama"), samples()
    labels = batches[0]["input_ids"].clone()
    labels[0, :5], labels[1, 2:], labels[3, 1::2] = -100, -100, -100
    batches = [{**batches[0], "labels": labels}]
    structure, (groups, *sizes) = infer_structure(model), FAMILIES["llama"]
    scores = score(model, structure, LLMPrunerConfig(0.5, criterion=criterion), batches)
    gradients = sample_gradients(model, batches)
    for branch, units in zip(("attention", "mlp"), groups(model, 1, *sizes), strict=True):
        expected = reference(model, units, gradients, criterion, "sum")
        torch.testing.assert_close(scores[f"layers.1.{branch}"], expected, rtol=2e-4, atol=1e-8)


@pytest.mark.parametrize("criterion", [*CRITERIA, "fisher"])
def test_batching_does_not_matter(criterion):
    model = tiny_model("llama")
    structure = infer_structure(model)
    config = LLMPrunerConfig(0.5, criterion=criterion)
    whole, parts = (score(model, structure, config, samples(batch_size=size)) for size in (4, 1))
    for axis in whole:
        torch.testing.assert_close(whole[axis], parts[axis], rtol=1e-4, atol=1e-9)


def test_sum_of_squares_weighs_the_second_term_of_mixed_as_the_paper_does():
    model = tiny_model("llama")
    structure, batches = infer_structure(model), samples()
    gradients = sample_gradients(model, batches)
    config = LLMPrunerConfig(0.5, criterion="mixed", normalisation="sum")
    scores = score(model, structure, config, batches)
    units = llama_groups(model, 0, 6, 3, 10)[1]
    expected = reference(model, units, gradients, "mixed", "sum", normalisation="sum")
    torch.testing.assert_close(scores["layers.0.mlp"], expected, rtol=2e-4, atol=1e-8)
    mean = score(model, structure, dataclasses.replace(config, normalisation="mean"), batches)
    assert not torch.allclose(mean["layers.0.mlp"], expected, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_fisher_is_the_squared_derivative_by_a_mask(name):
    """Against finite differences of the loss in float64: a mask on one unit at a time, one sample at a time."""
    from hf_prune.layers.masking import mask_axis

    model = tiny_model(name).double()
    model.set_experts_implementation("eager")
    structure, batches = infer_structure(model), samples(num_samples=2, batch_size=2)
    scores = score(model, structure, LLMPrunerConfig(0.5, criterion="fisher"), batches)
    step = 1e-2  # norms compute in float32, whatever the dtype of the model
    for axis, unit in itertools.product(("layers.0.attention", "layers.1.mlp"), (0, 1)):
        derivatives = []
        for row in batches[0]["input_ids"]:
            losses = []
            for sign in (1, -1):
                mask = torch.ones(structure.axes[axis].num_units, dtype=torch.float64)
                mask[unit] += sign * step
                with mask_axis(model, structure, axis, mask), torch.no_grad():
                    losses.append(model(input_ids=row[None], labels=row[None]).loss)
            derivatives.append((losses[0] - losses[1]) / (2 * step))
        expected = torch.stack(derivatives).square().mean()
        assert scores[axis][unit].item() == pytest.approx(expected.item(), rel=2e-2)


def test_layers_rank_by_their_own_importance():
    model = tiny_model("llama")
    structure, batches = infer_structure(model), samples()
    gradients = sample_gradients(model, batches)
    config = LLMPrunerConfig(0.3, criterion="first_order", axes=("layer",))
    found = score(model, structure, config, batches)["layers"]
    weights = dict(model.named_parameters())
    for layer in range(3):
        names = [n for n in weights if n.startswith(f"model.layers.{layer}.")]
        total = sum((weights[n] * sum(g[n] for g in gradients) / 4).abs().sum() for n in names)
        assert found[layer].item() == pytest.approx(total.item(), rel=1e-4)
    plan = allocate({"layers": found}, structure, config)
    assert plan.removed_layers == {int(found.argmin())}


def test_hidden_axis_sums_over_everything_it_touches():
    model = tiny_model("llama")
    structure, batches = infer_structure(model), samples()
    gradients = sample_gradients(model, batches)
    found = score(model, structure, LLMPrunerConfig(0.3, criterion="first_order", axes=("hidden",)), batches)["hidden"]
    total = torch.zeros(48)
    for name, w in model.named_parameters():
        salience = (w.detach() * sum(g[name] for g in gradients) / 4).abs()
        for dim, size in enumerate(salience.shape):
            if (size == 48 and "lm_head" not in name) or (dim == 1 and size == 48):
                total += (
                    salience.sum([d for d in range(salience.dim()) if d != dim]) if salience.dim() > 1 else salience
                )
    torch.testing.assert_close(found, total, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("criterion", ["vector", "first_order", "second_order", "fisher"])
def test_half_precision_keeps_the_order(criterion):
    """Gradients that vanish in float16 would make the order that of the indices: the released code's fault."""
    model = tiny_model("llama")
    structure, batches = infer_structure(model), samples()
    config = LLMPrunerConfig(0.5, criterion=criterion)
    exact = score(model, structure, config, batches)
    for dtype in (torch.bfloat16, torch.float16):
        half = score(tiny_model("llama").to(dtype), structure, config, batches)
        for axis in ("layers.0.mlp", "layers.2.mlp"):
            ranks = torch.stack([scores[axis].argsort().argsort().double() for scores in (exact, half)])
            assert torch.corrcoef(ranks)[0, 1] > 0.9, (dtype, axis)


def test_model_is_left_as_it_was():
    model = tiny_model("llama").train()
    model.model.layers[0].mlp.gate_proj.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    for criterion in ("first_order", "fisher"):
        score(model, infer_structure(model), LLMPrunerConfig(0.5, criterion=criterion), samples())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
    assert model.training
    assert torch.equal(model.lm_head.weight.grad, torch.ones_like(model.lm_head.weight))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("criterion", ["first_order", "fisher"])
def test_gradient_checkpointing_gives_the_same_scores(criterion):
    model = tiny_model("llama")
    structure, batches = infer_structure(model), samples()
    config = LLMPrunerConfig(0.5, criterion=criterion)
    plain = score(model, structure, config, batches)
    model.activation_checkpointing_enable()
    again = score(model, structure, config, batches)
    for axis in plain:
        torch.testing.assert_close(plain[axis], again[axis], rtol=1e-5, atol=1e-9)


def dispatched(tmp_path, *offloaded):
    """The tiny llama under accelerate's hooks, some of its modules on disk."""
    model = tiny_model("llama")
    names = [f"model.layers.{layer}" for layer in range(3)] + ["model.embed_tokens", "model.norm", "lm_head"]
    names.append("model.rotary_emb")
    places = {name: "disk" if name in offloaded else "cpu" for name in names}
    return dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)


@pytest.mark.parametrize("criterion", [*CRITERIA, "fisher"])
def test_device_map_gives_the_same_scores(criterion, tmp_path):
    config = LLMPrunerConfig(0.5, criterion=criterion)
    plain = tiny_model("llama")
    structure = infer_structure(plain)
    offloaded = ("model.layers.1", "model.layers.2") if criterion == "fisher" else ()
    found = score(dispatched(tmp_path, *offloaded), structure, config, samples())
    expected = score(plain, structure, config, samples())
    for axis in expected:
        assert torch.equal(found[axis], expected[axis])


@pytest.mark.parametrize("criterion", ["vector", "first_order", "fisher"])
def test_offloaded_weights_are_loaded_when_their_layer_runs(tmp_path, criterion):
    model, structure = dispatched(tmp_path, "model.layers.1"), infer_structure(tiny_model("llama"))
    config = LLMPrunerConfig(0.5, criterion=criterion)
    found = score(model, structure, config, samples())
    for name, values in score(tiny_model("llama"), structure, config, samples()).items():
        assert torch.equal(found[name], values)
    assert any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("criterion", ["first_order", "fisher"])
@pytest.mark.parametrize(
    "axes", [("mlp", "attention", "hidden"), ("mlp", "attention", "layer"), ("mlp", "layer_attention", "layer_mlp")]
)
def test_modes_mix_in_one_plan(axes, criterion):
    """Block, channel and layer mode compete for one budget, and the model that results runs."""
    model = tiny_model("llama")
    structure, batches = infer_structure(model), samples()
    config = LLMPrunerConfig(0.45, axes=axes, criterion=criterion, budget="model")
    plan = allocate(score(model, structure, config, batches), structure, config)
    dearest = max(
        structure.num_parameters() - structure.num_parameters({name: axis.num_units - 1})
        for name, axis in structure.axes.items()
        if (axis.layer is not None and not axis.block) or name == "hidden"
    )
    layer = sum(structure.numel(name) for name in structure.parameters_of_layer("layers", 0))
    assert abs(plan.achieved["model"] - 0.45) * structure.num_parameters() <= max(dearest, layer)
    pruned = apply_plan(model, structure, plan)
    assert sum(p.numel() for p in pruned.parameters()) == plan.num_parameters(structure)
    assert pruned(**batches[0]).logits.isfinite().all()


def test_bad_input():
    model = tiny_model("llama")
    structure = infer_structure(model)
    with pytest.raises(CalibrationError, match="llm_pruner"):
        score(model, structure, LLMPrunerConfig(0.5), None)
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(ScoreError, match="loss is nan"):
        score(model, structure, LLMPrunerConfig(0.5), samples())
    with pytest.raises(ConfigError, match="criterion"):
        LLMPrunerConfig(0.5, criterion="third_order")
    with pytest.raises(ConfigError, match="preset"):
        LLMPrunerConfig.preset("paper", 0.25, 32)


@pytest.mark.parametrize(
    ("kwargs", "ratio", "layers", "expected"),
    [
        ({}, 0.25, range(4, 30), 5_422_977_024),
        ({}, 0.60, range(3, 31), 3_350_188_032),
        (
            {"vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8},
            0.25,
            range(4, 30),
            6_612_586_496,
        ),
    ],
    ids=["llama-7b-25", "llama-7b-60", "llama-3-8b-25"],
)
def test_parameter_counts_of_the_published_runs(kwargs, ratio, layers, expected):
    """From configs alone; the second is published as 3.350 B."""
    from transformers import LlamaConfig

    structure = infer_structure(LlamaConfig(**kwargs))
    config = LLMPrunerConfig(ratio, budget="units", allocation="uniform", layers=tuple(layers))
    scores = {
        name: torch.arange(axis.num_units).float() for name, axis in structure.axes.items() if axis.layer in layers
    }
    assert allocate(scores, structure, config).num_parameters(structure) == expected
