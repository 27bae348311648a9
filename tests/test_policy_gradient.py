"""Learning policy-gradient masks: budgets, the best mask, resuming, several processes, bad input."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
import torch
from killing import FORKS, hold
from models import make_plan, random_kept, shared_model, shared_structure, tiny_model, token_ids

from hf_prune import prune
from hf_prune.allocation import allocate
from hf_prune.config import PolicyGradientConfig
from hf_prune.errors import BudgetError, CalibrationError, CheckpointError, ConfigError, ScoreError, StructureError
from hf_prune.layers.masking import keep_mask
from hf_prune.layers.walk import Walk
from hf_prune.scores import METHODS, score
from hf_prune.scores.policy_gradient import as_scores, learn_policy, training
from hf_prune.scores.policy_gradient.forward import MaskedModel, open_model
from hf_prune.scores.policy_gradient.policy import (
    find_units,
    initial_widths,
    lowest_widths,
    paper_profile,
    project_widths,
    soft_profile,
)
from hf_prune.structure.inference import infer_structure

CPU = torch.device("cpu")
QUICK = {
    "policy_steps": 8,
    "num_masks": 2,
    "windows_per_step": 4,
    "init": "magnitude",
    "policy": "widths_then_units",
    "state_steps": 3,
    "forward_rows": 8,
}


def samples(num_samples=12, length=9, batch_size=5, seed=0):
    ids = token_ids(num_samples, length, seed)
    return [{"input_ids": ids[start : start + batch_size]} for start in range(0, num_samples, batch_size)]


def learn(model, config, scores=None, batches=None, seed=0):
    structure = infer_structure(model)
    units = find_units(structure, config, CPU)
    if scores is None:
        generator = torch.Generator().manual_seed(7)
        scores = {axis.name: torch.rand(axis.num_units, generator=generator) for axis in units.axes}
    return learn_policy(
        Walk(model, structure.layer_paths, batches or samples()),
        structure,
        config,
        scores,
        torch.Generator().manual_seed(seed),
    )


# --- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("budget", ["decoder", "model", "units"])
@pytest.mark.parametrize("axes", [("mlp", "attention"), ("mlp", "attention", "layer_mlp", "layer_attention", "layer")])
def test_what_a_mask_keeps_is_counted_exactly(family, budget, axes):
    structure = shared_structure(family)
    units = find_units(structure, PolicyGradientConfig(0.3, budget=budget, axes=axes), CPU)
    rng = random.Random(1)
    layers = len(structure.layer_paths)
    for _ in range(5):
        kept = random_kept(structure, rng, ("attention", "mlp"))
        if "layer" in axes:
            kept["layers.mlp"] = tuple(sorted(rng.sample(range(layers), layers - 1)))
            kept["layers.attention"] = (0, *sorted(rng.sample(range(1, layers), layers - 2)))
            kept["layers"] = tuple(sorted(rng.sample(range(layers), layers - 1)))
        mask = torch.zeros(len(units.costs))
        for name, part in units.split(mask).items():
            part[list(kept.get(name, range(len(part))))] = 1
        gone = set(range(layers)) - set(kept.get("layers", range(layers)))
        branches = [(b, i) for b in ("mlp", "attention") for i in set(range(layers)) - set(kept.get(f"layers.{b}", ()))]
        branches = [] if "layer" not in axes else branches
        # a plan does not speak of what goes with its layer or branch
        plan = {
            name: tuple(i for i in indices if name not in ("layers.mlp", "layers.attention") or i not in gone)
            for name, indices in kept.items()
            if structure.axes[name].layer not in gone
            and not any(name.startswith(f"layers.{i}.{b}") for b, i in branches)
        }
        made = make_plan(structure, plan)
        if budget == "units":
            # a unit of a branch axis whose layer is gone was counted with it; inside of the mask both stand
            if "layer" in axes:
                continue
            expected = sum(made.widths[axis.name] for axis in units.axes)
        else:
            expected = made.num_parameters(structure, budget)
        assert units.kept(mask).item() == pytest.approx(expected, rel=1e-6)
    assert units.kept(torch.ones(len(units.costs))).item() == pytest.approx(units.total)


@pytest.mark.parametrize("policy", ["units", "widths", "widths_then_units"])
@pytest.mark.parametrize("axes", [("mlp", "attention"), ("mlp", "attention", "layer_mlp")])
def test_the_budget_holds_after_learning_and_in_the_plan(policy, axes):
    config = PolicyGradientConfig(0.4, axes=axes, **{**QUICK, "policy": policy})
    learned = learn(tiny_model("llama", dtype=torch.float32), config)
    assert [row["step"] for row in learned.history] == list(range(8))
    for row in learned.history:
        assert row["kept"] == pytest.approx(0.6, abs=2e-3)
        assert 0 < row["entropy"] <= 1
        assert row["loss"] > 0
    assert learned.history[-1]["token_forwards"] == 8 * 4 * 3 * 9
    assert bool(((learned.keep_probs > 0) & (learned.keep_probs <= 1)).all())
    structure = shared_structure("llama")
    plan = allocate(as_scores(learned.units, learned.keep_probs), structure, config)
    step = sum(structure.numel(n) for n in structure.parameters_of_layer("layers.mlp", 0)) if len(axes) > 2 else 5000
    assert abs(plan.achieved["decoder"] - 0.4) <= step / structure.num_parameters(budget="decoder")
    if axes == ("mlp", "attention"):  # units that the plan keeps have higher probabilities than those it removes
        kept = [learned.units.split(learned.keep_probs)[n][list(k)].min() for n, k in plan.kept_indices.items()]
        gone = [
            learned.units.split(learned.keep_probs)[n][[i for i in range(plan.num_units[n]) if i not in k]].max()
            for n, k in plan.kept_indices.items()
        ]
        assert sorted(max(gone) - k > 0 for k in kept).count(True) <= 1  # but for rounding at the cut


def test_separate_budgets_take_the_same_fraction_of_each_kind():
    config = PolicyGradientConfig.preset("paper", 0.5, **{**QUICK, "policy": "units"}, windows_per_mask=4)
    model, structure = tiny_model("llama_tied", dtype=torch.float32), shared_structure("llama_tied")
    scores = {axis.name: torch.rand(axis.num_units) for axis in find_units(structure, config, CPU).axes}
    learned = learn(model, config, scores)
    units = learned.units
    for group in units.groups:
        kept = (learned.keep_probs * units.costs)[group].sum() / units.costs[group].sum()
        assert kept.item() == pytest.approx(0.5, abs=0.01)
    # also where the probabilities of the two kinds do not compare
    for probs in (
        learned.keep_probs,
        torch.where(units.groups[1], 0.5 + learned.keep_probs / 2, learned.keep_probs / 2),
    ):
        widths = allocate(as_scores(units, probs), structure, config).widths
        assert sum(widths[f"layers.{i}.mlp"] for i in range(3)) == pytest.approx(60, abs=8)
        assert sum(widths[f"layers.{i}.attention"] for i in range(3)) == 3


def test_initial_probabilities():
    structure = shared_structure("llama")
    config = PolicyGradientConfig(0.4)
    units = find_units(structure, config, CPU)
    generator = torch.Generator().manual_seed(0)
    scores = {axis.name: torch.rand(axis.num_units, generator=generator) * 10 for axis in units.axes}
    widths = initial_widths(units, scores, config)
    assert torch.allclose(widths, torch.full_like(widths, float(widths[0])))
    mapped = units.split(paper_profile(units, widths, scores, 0.02))
    ranks = units.ranks(scores)
    by_rank = units.split(soft_profile(units, widths, ranks, 0.1))
    for width, name in zip(widths, mapped, strict=True):
        assert mapped[name].mean().item() == pytest.approx(width.item(), abs=1e-4)
        assert torch.equal(by_rank[name].argsort(), scores[name].argsort())
        rising = mapped[name][scores[name].argsort()].diff()
        assert bool((rising >= 0).all())
        assert units.split(ranks)[name][scores[name].argmax()] == 0
    everything = {name: values + (1e4 if "attention" in name else 0) for name, values in scores.items()}
    best = initial_widths(units, everything, dataclasses.replace(config, init_widths="global"))
    plan = allocate(everything, structure, config)
    for width, axis in zip(best, units.axes, strict=True):
        assert width.item() * axis.num_units == pytest.approx(plan.widths[axis.name], abs=1)


def test_widths_respect_floors_and_what_must_stay():
    structure = shared_structure("llama")
    config = PolicyGradientConfig(0.3, min_units=2, axes=("mlp", "attention", "layer_attention"))
    units = find_units(structure, config, CPU)
    low = lowest_widths(units, config)
    assert [round(x * n) for x, n in zip(low.tolist(), units.sizes.tolist(), strict=True)] == [2] * 7
    ranks = units.ranks({axis.name: torch.arange(axis.num_units) for axis in units.axes})
    asked = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) * 3 - 1
    projected = project_widths(units, asked, low, ranks)
    assert bool((projected >= low - 1e-6).all())
    assert bool((projected <= 1).all())
    assert units.split(units.frozen)["layers.attention"].tolist() == [True, False, False]
    assert units.split(ranks)["layers.attention"].tolist() == [0, 2, 1]


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def enumerable():
    """A model of two MLPs with six channels, and the loss of each of the 495 ways to remove four of them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2}
    state = torch.get_rng_state()
    torch.manual_seed(6)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, max_position_embeddings=32, **sizes)).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
                linear.weight.normal_(std=0.5)
    torch.set_rng_state(state)
    structure = infer_structure(model)
    config = PolicyGradientConfig(4 / 12, budget="units", axes=("mlp",))
    units = find_units(structure, config, CPU)
    masks = torch.ones(495, 12, dtype=torch.bool)
    for mask, removed in zip(masks, itertools.combinations(range(12), 4), strict=True):
        mask[list(removed)] = False
    windows = token_ids(4, length=12, seed=1)
    with open_model(Walk(model, structure.layer_paths), structure, units, reward="kl", forward_rows=2000) as run:
        losses = run.losses(windows, masks[None], 4)[0]
    best, second = losses.sort().values[:2].tolist()
    assert second - best > 0.05 * best
    return model, structure, config, units, windows, masks[losses.argmin()]


@pytest.mark.parametrize("estimator", ["leave_one_out", pytest.param("disarm", marks=pytest.mark.slow)])
def test_it_finds_the_best_mask(enumerable, estimator):
    model, structure, config, units, windows, best = enumerable
    config = dataclasses.replace(
        config,
        policy="units",
        estimator=estimator,
        policy_steps=60,
        num_masks=32,
        windows_per_step=4,
        windows_per_mask=4,
        learning_rate=0.05,
        forward_rows=200,
    )
    flat = {axis.name: torch.zeros(6) for axis in units.axes}
    learned = learn_policy(
        Walk(model, structure.layer_paths, [{"input_ids": windows}]),
        structure,
        config,
        flat,
        torch.Generator().manual_seed(0),
    )
    plan = allocate(as_scores(units, learned.keep_probs), structure, config)
    kept = {name: tuple(part.nonzero()[:, 0].tolist()) for name, part in units.split(best).items()}
    assert {name: plan.kept_indices.get(name, tuple(range(6))) for name in kept} == kept
    early, late = (sum(row["loss"] for row in rows) for rows in (learned.history[:10], learned.history[-10:]))
    assert late < 0.8 * early


def test_widths_go_where_they_matter():
    """One MLP does nothing: the policy takes all it may from there, and its plan is better than what it began with."""
    model, structure = tiny_model("llama", dtype=torch.float32), shared_structure("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    config = PolicyGradientConfig(0.3, axes=("mlp",), policy="widths", policy_steps=50, num_masks=2)
    learned = learn(model, config)
    plans = [
        allocate(as_scores(learned.units, probs), structure, config) for probs in (learned.initial, learned.keep_probs)
    ]
    assert plans[0].widths["layers.1.mlp"] >= 10
    assert plans[1].widths["layers.1.mlp"] <= 4
    masks = torch.ones(1, 2, len(learned.keep_probs), dtype=torch.bool)
    for mask, plan in zip(masks[0], plans, strict=True):
        for name, part in learned.units.split(mask).items():
            part.copy_(keep_mask(len(part), plan.kept_indices.get(name, tuple(range(len(part))))))
    with open_model(Walk(model, structure.layer_paths), structure, learned.units, reward="kl") as run:
        before, after = run.losses(token_ids(12, 9, 0), masks, 12)[0].tolist()
    assert after < 0.7 * before


@pytest.mark.parametrize("init", ["random", "magnitude", "wanda", "llm_pruner", "prunenet"])
def test_every_initialisation_and_the_model_is_left_as_it_was(init):
    model = tiny_model("llama", dtype=torch.float32).train()
    structure = infer_structure(model)
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    config = PolicyGradientConfig(0.4, **{**QUICK, "init": init})
    found = score(model, structure, config, samples())
    again = score(model, structure, config, samples(), torch.Generator().manual_seed(0))
    other = score(model, structure, dataclasses.replace(config, seed=1), samples())
    assert list(found) == [f"layers.{i}.{branch}" for branch in ("mlp", "attention") for i in range(3)]
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert any(not torch.equal(found[name], other[name]) for name in found)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for name, parameter in model.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])
        assert parameter.requires_grad
    assert all(not parameter.is_inference() for parameter in model.parameters())


def test_windows_are_all_used_before_one_comes_again():
    config = PolicyGradientConfig(0.4, **QUICK)
    model = tiny_model("llama", dtype=torch.float32)
    structure = infer_structure(model)
    windows = training.all_windows(Walk(model, structure.layer_paths, samples()), config)
    units = find_units(structure, config, CPU)
    scores = {axis.name: torch.zeros(axis.num_units) for axis in units.axes}
    with open_model(Walk(model, structure.layer_paths), structure, units) as run:
        learning = training._Learning(run, units, config, windows, scores, seed=5)
    epochs = [torch.cat([learning.next_windows(3 * epoch + i) for i in range(3)]) for epoch in range(2)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == sorted(windows.tolist())
    assert not torch.equal(*epochs)


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [3, 11])
@pytest.mark.parametrize("estimator", ["paper", "disarm"])
def test_an_interrupted_run_goes_on_to_the_same_result(tmp_path, monkeypatch, stop, estimator):
    model = tiny_model("llama", dtype=torch.float32)
    config = PolicyGradientConfig(0.4, **{**QUICK, "policy_steps": 14}, estimator=estimator)
    whole = learn(model, config)
    config = dataclasses.replace(config, state_dir=str(tmp_path / "state"), state_steps=100)
    losses = MaskedModel.losses
    calls = itertools.count()

    def interrupted(self, *args):
        if next(calls) == stop:
            raise KeyboardInterrupt
        return losses(self, *args)

    monkeypatch.setattr(MaskedModel, "losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        learn(model, config)
    assert not any(module._forward_pre_hooks for module in model.modules())
    calls = itertools.count(100)
    resumed = learn(model, config)
    assert next(calls) == 100 + 14 - stop, "steps that were done were done again"
    assert torch.equal(resumed.keep_probs, whole.keep_probs)
    assert resumed.history == whole.history
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["policy.safetensors"]
    finished = learn(model, config)
    assert next(calls) == 100 + 14 - stop + 1, "a finished run takes no more steps"
    assert torch.equal(finished.keep_probs, whole.keep_probs)


def test_the_state_is_written_as_often_as_asked(tmp_path, monkeypatch):
    config = PolicyGradientConfig(0.4, **QUICK, state_dir=str(tmp_path))
    written = []
    monkeypatch.setattr(training.StateFile, "save", lambda self, state: written.append(state.step))
    learn(tiny_model("llama", dtype=torch.float32), config)
    assert written == [3, 6, 8]


def test_every_step_of_gradual_pruning_has_its_state(tmp_path, monkeypatch):
    config = PolicyGradientConfig(0.4, **QUICK, num_steps=2)
    wanted = prune(tiny_model("llama", dtype=torch.float32), config, calibration=samples())
    config = dataclasses.replace(config, state_dir=str(tmp_path / "state"))
    for may_learn in (True, False):
        if not may_learn:
            monkeypatch.setattr(MaskedModel, "losses", None)
        found = prune(tiny_model("llama", dtype=torch.float32), config, calibration=samples())
        assert found.plan.kept_indices == wanted.plan.kept_indices
    assert len(list((tmp_path / "state").rglob("policy.safetensors"))) == 2


def test_two_runs_at_once_are_refused(tmp_path):
    taken, done = FORKS.Event(), FORKS.Event()
    other = FORKS.Process(target=hold, args=(str(tmp_path / "state"), taken, done))
    other.start()
    assert taken.wait(60)
    config = PolicyGradientConfig(0.4, **QUICK, state_dir=str(tmp_path / "state"))
    model = tiny_model("llama", dtype=torch.float32)
    with pytest.raises(CheckpointError, match=rf"state is being written to by process {other.pid} on "):
        score(model, infer_structure(model), config, batches=samples())
    other.kill()
    other.join()


def test_the_state_of_another_run_is_refused(tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    config = PolicyGradientConfig(0.4, **QUICK, state_dir=str(tmp_path))
    learn(model, config)
    file = tmp_path / "policy.safetensors"
    before = file.read_bytes()
    for other, batches, word in (
        (dataclasses.replace(config, pruning_ratio=0.3), None, "pruning_ratio"),
        (dataclasses.replace(config, policy_steps=9), None, "policy_steps"),
        (config, samples(seed=4), "windows_and_scores"),
    ):
        with pytest.raises(CheckpointError, match=word):
            learn(model, other, batches=batches)
    with pytest.raises(CheckpointError, match="seed_drawn"):
        learn(model, config, seed=1)
    assert file.read_bytes() == before
    learn(model, dataclasses.replace(config, forward_rows=3, state_steps=1))  # these change nothing
    for damage in (b"", before[:200], b"{}" * 40):
        file.write_bytes(damage)
        with pytest.raises(CheckpointError, match="damaged"):
            learn(model, config)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("init", "best"),
        ("policy", "layers"),
        ("estimator", "reinforce"),
        ("direction", "newton"),
        ("reward", "accuracy"),
        ("policy_steps", 0),
        ("num_masks", 1),
        ("num_masks", 3),
        ("windows_per_mask", 3),
        ("clamp", 0.5),
        ("clamp", 0.0),
        ("learning_rate", -1.0),
        ("learning_rate", float("nan")),
        ("widths_fraction", 1.0),
        ("widths_noise", True),
        ("softness", 0),
        ("separate_budgets", 1),
        ("state_dir", ""),
    ],
)
def test_settings_are_checked(field, value):
    with pytest.raises(ConfigError, match=field):
        PolicyGradientConfig(0.3, **{field: value})


def test_presets_and_json():
    config = PolicyGradientConfig.preset("paper", 0.3, policy_steps=20)
    assert (config.num_masks, config.windows_per_mask, config.estimator, config.reward) == (2, 8, "paper", "lm")
    assert config.separate_budgets
    assert PolicyGradientConfig.from_json(config.to_json()) == config
    assert PolicyGradientConfig.preset("recommended", 0.3) == PolicyGradientConfig(0.3)
    with pytest.raises(ConfigError, match="preset"):
        PolicyGradientConfig.preset("best", 0.3)
    with pytest.raises(ConfigError, match="separate_budgets"):
        PolicyGradientConfig(0.3, axes=("mlp", "layer"), separate_budgets=True)


def test_bad_input(monkeypatch):
    model, structure = tiny_model("llama", dtype=torch.float32), shared_structure("llama")
    config = PolicyGradientConfig(0.4, **QUICK)
    with pytest.raises(CalibrationError, match="policy_gradient"):
        score(model, structure, config, None)
    with pytest.raises(CalibrationError, match="found none"):
        score(model, structure, config, [])
    with pytest.raises(CalibrationError, match=r"\[5, 9\]"):
        score(model, structure, config, [*samples(), *samples(length=5)])
    with pytest.raises(CalibrationError, match="found 3 calibration windows"):
        score(model, structure, config, samples(num_samples=3))
    with pytest.raises(BudgetError, match="out of reach"):
        score(model, structure, dataclasses.replace(config, pruning_ratio=0.9, axes=("attention",)), samples())
    with pytest.raises(StructureError, match="protect"):
        score(tiny_model("mixtral", dtype=torch.float32), shared_structure("mixtral"), config, samples())
    with pytest.raises(StructureError, match="hidden"):
        score(model, structure, dataclasses.replace(config, axes=("hidden",)), samples())
    with pytest.raises(ConfigError, match="latency"):
        score(model, structure, dataclasses.replace(config, budget="latency"), samples())
    monkeypatch.delitem(METHODS, "wanda")
    with pytest.raises(ConfigError, match="wanda"):
        score(model, structure, dataclasses.replace(config, init="wanda"), samples())
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(ScoreError, match="loss of sampled masks is nan"):
        score(model, structure, dataclasses.replace(config, policy_steps=10), samples())


# --- several processes ------------------------------------------------------------------------------------------------


def test_each_process_takes_its_share_of_the_windows(monkeypatch):
    """Without communication, each of three processes has zeros where the others' windows are."""
    from hf_prune.scores.policy_gradient import forward

    model, structure = shared_model("llama"), shared_structure("llama")
    units = find_units(structure, PolicyGradientConfig(0.4), CPU)
    windows = token_ids(5)
    masks = torch.rand(5, 2, len(units.costs), generator=torch.Generator().manual_seed(0)) < 0.6
    monkeypatch.setattr(forward, "sum_over_processes", lambda values: values)
    parts = []
    with open_model(Walk(model, structure.layer_paths), structure, units) as run:
        whole = run.losses(windows, masks, 1)
        for index in range(3):
            state = type("State", (), {"process_index": index, "num_processes": 3})
            monkeypatch.setattr(forward, "PartialState", state)
            parts.append(run.losses(windows, masks, 1))
    assert [int((part != 0).any(1).sum()) for part in parts] == [2, 2, 1]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-6, atol=0)


# --- the picture ------------------------------------------------------------------------------------------------------


def test_learning_curve_picture(tmp_path):
    from hf_prune.report.pictures import learning_curve_picture

    config = PolicyGradientConfig(0.4, **QUICK)
    history = learn(tiny_model("llama", dtype=torch.float32), config).history
    assert [row["phase"] for row in history] == ["widths"] * 4 + ["units"] * 4
    learning_curve_picture(history, tmp_path / "new" / "curve.svg", title="a title")
    text = (tmp_path / "new" / "curve.svg").read_text()
    learning_curve_picture([row | {"phase": "units"} for row in history], tmp_path / "plain.svg", title="a title")
    assert text.count("<path") > (tmp_path / "plain.svg").read_text().count("<path"), "no mark where units begin"
    with pytest.raises(ConfigError, match="one of"):
        learning_curve_picture(history, tmp_path / "curve.txt")
    with pytest.raises(ConfigError, match="1 steps"):
        learning_curve_picture(history[:1], tmp_path / "curve.svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "plain.svg"]
