"""PruneNet: spectra against SVD and scipy, probabilities against sums over all orders, learning, scores, policies."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from models import permute_units_, shared_model, shared_structure, tiny_model
from safetensors.torch import save_file
from scipy.stats import ks_2samp

from hf_prune.allocation import allocate
from hf_prune.config import PruneNetConfig, PruningConfig
from hf_prune.errors import CheckpointError, ConfigError, ScoreError, StructureError
from hf_prune.layers.walk import Walk
from hf_prune.layers.work import read_tensors, write_tensors
from hf_prune.scores import score
from hf_prune.scores.prunenet import Policy, train_policy
from hf_prune.scores.prunenet.layer_importance import layer_importance
from hf_prune.scores.prunenet.policy import log_probability, sample, scale_free_features
from hf_prune.scores.prunenet.scoring import marginal_losses
from hf_prune.scores.prunenet.spectra import Spectrum, density, kept_spectra, ks_statistic
from hf_prune.scores.prunenet.training import train
from hf_prune.scores.prunenet.unit_matrix import UnitMatrix, unit_matrix
from hf_prune.structure.inference import infer_structure

FAMILIES = ("llama", "gpt2", "opt", "gpt_neox", "phi3", "mixtral", "bloom", "gemma3_text")
QUICK = {"num_episodes": 3, "num_rollouts": 3}


def matrix(num_units: int, block: int, width: int, seed: int = 0, spread: float = 0.5) -> torch.Tensor:
    """Rows of log-normal norms."""
    generator = torch.Generator().manual_seed(seed)
    scale = (spread * torch.randn(num_units, 1, 1, generator=generator)).exp()
    return torch.randn(num_units, block, width, generator=generator) * scale


def masks(num_units: int, kept: int, count: int = 3, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    found = torch.zeros(count, num_units, dtype=torch.bool)
    for mask in found:
        mask[torch.randperm(num_units, generator=generator)[:kept]] = True
    return found


def layers_of(rows: list[torch.Tensor]) -> dict[str, UnitMatrix]:
    return {str(i): UnitMatrix(m, m.norm(dim=(1, 2)), m.norm(dim=(1, 2)).flip(0)) for i, m in enumerate(rows)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("block", "kept"), [(1, 40), (1, 20), (1, 5), (3, 30), (3, 2)])
def test_spectra_and_ks_are_those_of_an_svd(block, kept, dtype):
    rows = matrix(48, block, 24).to(dtype)
    keep = masks(48, kept)
    dense = torch.linalg.svdvals(rows.flatten(0, 1).double())
    found = kept_spectra(rows, keep)
    spectrum = Spectrum(rows.float(), "ks", exact_up_to=100)
    for mask, values, loss in zip(keep, found, spectrum.losses(keep), strict=True):
        expected = torch.linalg.svdvals(rows[mask].flatten(0, 1).double())
        torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-7)
        exact = ks_2samp(dense.numpy(), expected.numpy()).statistic
        assert ks_statistic(dense, expected[None]).item() == pytest.approx(exact, rel=1e-6)
        assert loss.item() == pytest.approx(exact, rel=1e-6)


def test_spectra_of_several_layers_at_once():
    stacked = torch.stack([matrix(20, 1, 8, seed) for seed in (0, 1)])
    keep = torch.stack([masks(20, 12, seed=seed) for seed in (2, 3)])
    together = kept_spectra(stacked, keep)
    for layer, mask, values in zip(stacked, keep, together, strict=True):
        torch.testing.assert_close(values, kept_spectra(layer, mask))


@pytest.mark.parametrize("distance", ["ks", "wasserstein", "energy"])
def test_distances_are_zero_for_all_rows_and_grow(distance):
    rows = matrix(40, 1, 16)
    spectrum = Spectrum(rows, distance, exact_up_to=100)
    order = rows.norm(dim=(1, 2)).argsort(descending=True)
    found = []
    for kept in (40, 30, 20, 10, 0):
        mask = torch.zeros(1, 40, dtype=torch.bool)
        mask[0, order[:kept]] = True
        found.append(spectrum.losses(mask)[0].item())
    assert found[0] == pytest.approx(0, abs=1e-9)
    assert found[-1] == 1
    if distance != "ks":  # fewer rows than columns: KS may fall again
        assert found == sorted(found)


@pytest.mark.parametrize("kept", [600, 200])
@pytest.mark.parametrize(("distance", "tolerance"), [("ks", 0.04), ("wasserstein", 0.01)])
def test_density_is_close(distance, tolerance, kept):
    rows = matrix(900, 1, 360)
    keep = masks(900, kept)
    exact = Spectrum(rows, distance, exact_up_to=360).losses(keep)
    approximate = Spectrum(rows, distance, exact_up_to=359).losses(keep)
    assert (exact - approximate).abs().max() < tolerance
    assert not torch.equal(exact, approximate)
    values, weights = density(rows)
    assert weights.sum().item() == pytest.approx(1)
    assert (360 * (weights * values.square()).sum()).item() == pytest.approx(rows.square().sum().item(), rel=0.05)


def test_log_probability_is_that_of_drawing_without_replacement():
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1])
    orders = torch.tensor(list(itertools.permutations(range(4))))
    for kept in (1, 2, 4):
        first = orders[:, :kept].unique(dim=0)
        rest = torch.stack([torch.tensor([*f, *(u for u in range(4) if u not in f)]) for f in first.tolist()])
        probabilities = log_probability(logits, rest, kept).exp()
        assert probabilities.sum().item() == pytest.approx(1, rel=1e-5)
        for order, probability in zip(first.tolist(), probabilities, strict=True):
            expected, remaining = 1.0, set(range(4))
            for unit in order:
                expected *= math.exp(logits[unit]) / sum(math.exp(logits[u]) for u in remaining)
                remaining.remove(unit)
            assert probability.item() == pytest.approx(expected, rel=1e-5)


def test_samples_follow_the_log_probability():
    logits = torch.tensor([1.0, 0.0, -1.0])
    orders = sample(logits, 20_000, torch.Generator().manual_seed(0))
    for order in itertools.permutations(range(3)):
        share = (orders == torch.tensor(order)).all(1).float().mean().item()
        expected = log_probability(logits, torch.tensor([order]), 3).exp().item()
        assert share == pytest.approx(expected, abs=0.015)


def test_the_policy_learns_more_than_row_norms():
    """A matrix with large but redundant rows: norms keep them, the spectrum does not need them all."""
    base = matrix(96, 1, 32, spread=0.3)
    base[:32] = 2 * base[:1] / base[:1].norm() * 32**0.5 + 0.1 * base[:32]
    layers = layers_of([base, base.flip(0)])
    config = PruneNetConfig(0.5, num_episodes=30)
    weights = dict.fromkeys(layers, 1.0)
    policy = train(layers.__getitem__, {"0": 0.0, "1": 1.0}, weights, config, 0.5, torch.Generator().manual_seed(0))
    spectrum = Spectrum(base, "wasserstein", 100)
    norms = torch.zeros(1, 96, dtype=torch.bool)
    norms[0, base.norm(dim=(1, 2)).argsort(descending=True)[:48]] = True
    best = max(row["best"] for row in policy.history)
    by_norm, by_chance = -spectrum.losses(norms)[0], -spectrum.losses(masks(96, 48, 20)).mean()
    assert best > by_norm + 0.02
    assert best > by_chance + 0.02


@pytest.mark.parametrize("learning_rate", [0.25, 1000.0])
@pytest.mark.parametrize("distance", ["ks", "wasserstein", "energy"])
def test_a_policy_from_row_norms_never_ends_below_them(distance, learning_rate):
    """Also where every update makes it worse: the start is among the policies that the best is chosen from."""
    layers = layers_of([matrix(60, 2, 20, seed) for seed in (0, 1)])
    weights, depths = {"0": 1.0, "1": 3.0}, {"0": 0.0, "1": 1.0}
    config = PruneNetConfig(0.4, distance=distance, learning_rate=learning_rate, num_episodes=3)
    policy = train(layers.__getitem__, depths, weights, config, 0.4, torch.Generator().manual_seed(0))

    def reward(orders):
        found = 0.0
        for name, order in orders.items():
            mask = torch.zeros(1, 60, dtype=torch.bool)
            mask[0, order[:36]] = True
            found -= weights[name] * Spectrum(layers[name].state, distance, 100).losses(mask)[0].item() / 4
        return found

    by_norm = reward({name: rows.state.norm(dim=(1, 2)).argsort(descending=True) for name, rows in layers.items()})
    logits = {n: policy.logits(scale_free_features(rows, depths[n])) for n, rows in layers.items()}
    learned = reward({name: values.argsort(descending=True) for name, values in logits.items()})
    assert policy.history[0]["weighted"] == pytest.approx(by_norm, abs=1e-9)
    assert learned == pytest.approx(max(row["weighted"] for row in policy.history), abs=1e-9)
    assert learned >= by_norm - 1e-9


def test_a_spectrum_of_energies_holds_no_rows():
    """Streaming keeps one such object per layer: a view of the rows would keep the whole model."""
    rows = layers_of([matrix(60, 1, 20)])["0"].state
    kept = Spectrum(rows, "energy", 100)
    held = [value for value in vars(kept).values() if isinstance(value, torch.Tensor)]
    assert sum(value.untyped_storage().nbytes() for value in held) <= 8 * 60


def test_features_depend_on_no_scale_and_no_number_of_rows():
    layers = layers_of([matrix(60, 1, 20), 1000 * matrix(60, 1, 20)])
    first, scaled = (scale_free_features(rows, 0.5) for rows in layers.values())
    torch.testing.assert_close(first, scaled, rtol=1e-3, atol=1e-3)
    double = layers_of([torch.cat([matrix(60, 1, 20)] * 2)])["0"]
    double = UnitMatrix(double.state, *(v.norm(dim=(1, 2)) for v in (double.state, double.state)))
    single = UnitMatrix(double.state[:60], double.producer_norms[:60], double.consumer_norms[:60])
    torch.testing.assert_close(
        scale_free_features(double, 0.5)[:60], scale_free_features(single, 0.5), rtol=1e-2, atol=1e-2
    )
    wide = scale_free_features(layers_of([matrix(10, 1, 50)])["0"], 0.5)  # from the smaller side of the Gram matrix
    assert wide.shape == (10, 8)
    assert wide.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_every_architecture(family):
    model, structure = shared_model(family), shared_structure(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for allocation in ("global", "uniform"):
        config = PruneNetConfig(0.25, allocation=allocation, **QUICK)
        first, again = (score(model, structure, config) for _ in range(2))
        for name, values in first.items():
            assert torch.equal(values, again[name])
            assert len(values.unique()) > 1
        assert allocate(first, structure, config).achieved["decoder"] == pytest.approx(0.25, abs=0.05)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("state", ["gate", "gate_up", "group", "write"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_states_and_attention(family, state):
    config = PruneNetConfig(0.3, axes=("mlp", "attention"), state=state, distance="ks", **QUICK)
    model, structure = shared_model(family), shared_structure(family)
    if family == "phi3":
        config = PruneNetConfig(0.3, state=state, **QUICK)
    scores = score(model, structure, config)
    assert all(values.isfinite().all() for values in scores.values())
    read = dict(model.named_parameters()).__getitem__
    rows = unit_matrix(read, structure, structure.axes["layers.0.mlp"], state)
    if family == "llama":
        mlp = model.model.layers[0].mlp
        gate, up, down = (
            w.detach().float() for w in (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T)
        )
        expected = {
            "gate": gate,
            "gate_up": torch.cat([gate, up], 1),
            "group": torch.cat([gate, up, down], 1),
            "write": down * (gate.norm(dim=1) * up.norm(dim=1))[:, None],
        }[state]
        torch.testing.assert_close(rows.state[:, 0], expected)


def test_permuting_units_permutes_what_a_policy_says():
    model = tiny_model("llama")
    structure = infer_structure(model)
    policy = train_policy(
        Walk(model, structure.layer_paths), structure, PruneNetConfig(0.3, **QUICK), torch.Generator().manual_seed(0)
    )
    config = PruneNetConfig(0.3, allocation="uniform")
    name = "layers.1.mlp"
    permutation = torch.randperm(structure.axes[name].num_units, generator=torch.Generator().manual_seed(3))

    def logits():
        rows = unit_matrix(dict(model.named_parameters()).__getitem__, structure, structure.axes[name], config.state)
        return policy.logits(scale_free_features(rows, 0.5))

    before = logits()
    permute_units_(model, structure, name, permutation)
    torch.testing.assert_close(logits(), before[permutation], rtol=1e-3, atol=1e-4)


def test_marginal_losses_keep_the_order_and_add_up():
    rows = matrix(64, 1, 24)
    spectrum = Spectrum(rows, "wasserstein", 100)
    order = rows.norm(dim=(1, 2)).argsort(descending=True)
    found = marginal_losses(spectrum, order)
    assert torch.equal(found.argsort(descending=True), order)
    assert found.sum().item() == pytest.approx(1, rel=0.1)


def test_relative_updates_are_the_difference_that_a_branch_makes():
    for family in ("llama", "bloom", "gemma3_text", "opt"):
        model, structure = shared_model(family), shared_structure(family)
        axes = [structure.axes["layers.1.mlp"]]
        found = layer_importance(Walk(model, structure.layer_paths), structure, axes, torch.Generator().manual_seed(0))[
            "layers.1.mlp"
        ]
        ids = torch.randint(0, 96, (256, 1), generator=torch.Generator().manual_seed(0))
        outputs = {}
        layer = model.get_submodule(structure.layer_paths[1])
        consumer = next(m for m in structure.members["layers.1.mlp"] if m.role == "consumer").parameter
        weight = model.get_parameter(consumer)
        saved = weight.detach().clone()
        handle = layer.register_forward_hook(
            lambda m, a, o, found=outputs: found.update({len(found): (o[0] if isinstance(o, tuple) else o).detach()})
        )
        try:
            with torch.no_grad():
                model(input_ids=ids, use_cache=False)
                weight.zero_()
                model(input_ids=ids, use_cache=False)
        finally:
            handle.remove()
            with torch.no_grad():
                weight.copy_(saved)
        whole, without = outputs[0], outputs[1]
        share = ((whole - without).square().sum(-1) / whole.square().sum(-1)).mean().item()
        assert found == pytest.approx(min(share, 1), rel=1e-3), family


def test_sampled_plans_depend_on_the_seed_only(tmp_path):
    model, structure = shared_model("llama"), shared_structure("llama")
    Policy(torch.zeros(8), torch.zeros(()), "scale_free", "write").save(tmp_path / "flat")
    settings = {"policy": str(tmp_path / "flat"), "sampled": True, "allocation": "uniform"}
    plans = [
        allocate(score(model, structure, c), structure, c).kept_indices
        for c in (PruneNetConfig(0.3, seed=seed, **settings) for seed in (1, 1, 2))
    ]
    assert plans[0] == plans[1] != plans[2]


def test_policy_is_saved_and_reused(tmp_path):
    model, structure = shared_model("llama"), shared_structure("llama")
    path = str(tmp_path / "policy")
    trained = score(model, structure, PruneNetConfig(0.4, save_policy=path, **QUICK))
    reused = score(model, structure, PruneNetConfig(0.4, policy=path))
    assert all(torch.equal(trained[name], reused[name]) for name in trained)
    loaded = Policy.load(path)
    assert loaded.settings["pruning_ratio"] == 0.4
    assert len(loaded.history) == QUICK["num_episodes"] + 1
    other = shared_model("gpt2")  # another hidden size and another number of matrices
    scores = score(other, shared_structure("gpt2"), PruneNetConfig(0.2, policy=path))
    assert all(values.isfinite().all() for values in scores.values())


def test_policies_that_do_not_fit_are_refused(tmp_path):
    model, structure = shared_model("llama"), shared_structure("llama")
    path = tmp_path / "rows"
    train_policy(
        Walk(model, structure.layer_paths),
        structure,
        PruneNetConfig(0.3, features="row", start="zero", state="gate", **QUICK),
        torch.Generator().manual_seed(0),
    ).save(path)
    with pytest.raises(ConfigError, match="features='row'"):
        score(model, structure, PruneNetConfig(0.3, policy=str(path)))
    config = PruneNetConfig(0.3, policy=str(path), features="row", state="gate")
    with pytest.raises(ConfigError, match="rows of 48 numbers, this model has 40"):
        score(shared_model("gpt2"), shared_structure("gpt2"), config)
    with pytest.raises(CheckpointError, match="no policy can be read"):
        score(model, structure, PruneNetConfig(0.3, policy=str(tmp_path / "none")))
    tensors, values = read_tensors(path / "policy.safetensors")
    now = Policy.load(path)
    save_file(tensors, path / "policy.safetensors")  # as format 1 was: two files
    (path / "policy.json").write_text(json.dumps({**values, "format": 1}))
    first = Policy.load(path)
    assert torch.equal(first.weight, now.weight)
    assert (first.settings, first.history, first.features) == (now.settings, now.history, now.features)
    write_tensors(path / "policy.safetensors", tensors, {**values, "format": 1})
    with pytest.raises(CheckpointError, match="expected format 2"):
        Policy.load(path)
    (path / "policy.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="is damaged"):
        Policy.load(path)


def test_bad_weights_and_settings():
    model = tiny_model("llama")
    structure = infer_structure(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ScoreError, match=r"layers\.1\.mlp"):
        score(model, structure, PruneNetConfig(0.3, layer_weight="equal", **QUICK))
    with pytest.raises(ScoreError, match="layer 1"):
        score(model, structure, PruneNetConfig(0.3, **QUICK))
    with pytest.raises(ConfigError, match="hidden"):
        score(model, structure, PruneNetConfig(0.3, axes=("hidden",)))
    for bad in (
        {"state": "up"},
        {"distance": "l2"},
        {"start": "random"},
        {"features": "row", "start": "row_norm"},
        {"discount": 0.0},
        {"discount": 1.1},
        {"train_ratio": 1.0},
        {"num_rollouts": 1},
        {"learning_rate": math.inf},
        {"policy": ""},
        {"policy": "a", "save_policy": "b"},
        {"sampled": 1},
    ):
        with pytest.raises(ConfigError, match=next(reversed(bad))):
            PruneNetConfig(0.3, **bad)


def test_paper_preset_and_json():
    config = PruneNetConfig.paper(0.3)
    assert PruningConfig.from_json(config.to_json()) == config
    assert (config.state, config.distance, config.features, config.discount) == ("gate", "ks", "row", 0.99)
    assert config.start == "zero"
    model, structure = shared_model("llama"), shared_structure("llama")
    scores = score(model, structure, config)
    plan = allocate(scores, structure, config)
    assert len({plan.widths[f"layers.{i}.mlp"] for i in range(3)}) == 1


def test_an_axis_without_matrices_is_refused():
    structure = shared_structure("llama")
    import dataclasses

    members = tuple(m for m in structure.members["layers.0.mlp"] if m.role != "consumer")
    broken = dataclasses.replace(structure, members={**structure.members, "layers.0.mlp": members})
    with pytest.raises(StructureError, match="consumer"):
        score(shared_model("llama"), broken, PruneNetConfig(0.3, layer_weight="equal", **QUICK))
