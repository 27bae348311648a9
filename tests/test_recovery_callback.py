"""`PruningCallback`: small models out of a Trainer, exact numbers in its log, exact resume, clear refusals."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os

import pytest
import torch
from models import logits, make_plan, shared_structure, tiny_model, tiny_tokenizer, token_ids, write_text
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_prune import (
    LLMPrunerConfig,
    MagnitudeConfig,
    PruningCallback,
    PruningPlan,
    WandaConfig,
    align_to_checkpoint,
    lora_config,
    prune,
)
from hf_prune.allocation.steps import gone_units
from hf_prune.errors import BudgetError, CalibrationError, CheckpointError, ConfigError, StructureError
from hf_prune.layers.masking import masked
from hf_prune.recovery import callback as callback_module
from hf_prune.recovery.gradual import ZeroedUnits, ratio_at
from hf_prune.recovery.lora import add_adapters

CONFIG = LLMPrunerConfig(0.4)


def rows(count=48, length=10, seed=0):
    ids = token_ids(count, length, seed)
    return [{"input_ids": row, "labels": row} for row in ids]


def batches():
    return [{"input_ids": token_ids(4, 10, seed=7), "attention_mask": torch.ones(4, 10, dtype=torch.int64)}]


def arguments(directory, **options):
    settings = {
        "output_dir": str(directory),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return TrainingArguments(**settings | options)


def trainer_of(model, directory, callback=None, **options):
    callbacks = [callback] if callback is not None else []
    return Trainer(model, arguments(directory, **options), train_dataset=rows(), callbacks=callbacks)


def gradual(**settings):
    return PruningCallback(CONFIG, "gradual", calibration=batches(), **{"end_step": 6, "every": 2} | settings)


class Spy(TrainerCallback):
    """Records what another callback has in force after each step, or stops the run."""

    def __init__(self, watched=None, stop_at=None):
        self.watched, self.stop_at, self.plans = watched, stop_at, []

    def on_step_end(self, args, state, control, **kwargs):
        if self.watched is not None:
            self.plans.append(self.watched.plan)
        if state.global_step == self.stop_at:
            raise KeyboardInterrupt


def same(left, right):
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# --- the schedule and the masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cubic"])
def test_schedule_rises_from_nothing_to_the_whole_ratio(schedule):
    at = [ratio_at(s, begin_step=2, end_step=12, pruning_ratio=0.3, schedule=schedule) for s in range(16)]
    assert at[:3] == [0, 0, 0]
    assert at[12:] == [0.3] * 4
    assert all(low < high for low, high in itertools.pairwise(at[2:13]))
    middle = {"linear": 0.15, "cubic": 0.3 * (1 - 0.5**3)}[schedule]
    assert at[7] == pytest.approx(middle)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_neox", "falcon", "mixtral", "gemma3_text"])
def test_zeroed_weights_compute_what_the_masked_model_does(family):
    model, structure = tiny_model(family), shared_structure(family)
    kept = {f"layers.0.{kind}": (0, 2) for kind in ("attention", "mlp") if f"layers.0.{kind}" in structure.axes}
    kept |= {"layers.mlp": tuple(i for i in range(len(structure.layer_paths)) if i != 1)}
    kept = {name: units for name, units in kept.items() if structure.axes[name].prunable}
    if family == "mixtral":
        kept = {name: units for name, units in kept.items() if name != "layers.mlp"}
    plan = make_plan(structure, kept)
    dense = logits(model)
    with masked(model, structure, plan):
        expected = logits(model)
    ZeroedUnits(model, structure, plan).zero_()
    assert not torch.allclose(expected, dense)
    torch.testing.assert_close(logits(model), expected, rtol=1e-9, atol=1e-9)


# --- start ------------------------------------------------------------------------------------------------------------


def test_start_trains_the_model_that_prune_gives(tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    expected = prune(model, CONFIG, calibration=batches())
    callback = PruningCallback(CONFIG, calibration=batches())
    trainer = trainer_of(model, tmp_path, callback)
    assert trainer.model is model
    assert same(model, expected.model)
    assert callback.plan == expected.plan
    trainer.train()
    assert not same(model, expected.model)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 8
    for entry in entries:
        assert entry["prune/sparsity"] == expected.plan.achieved["decoder"]
        assert entry["prune/params"] == expected.model.num_parameters()
    assert trainer.state.log_history[0]["prune/layers.1.mlp"] == expected.plan.widths["layers.1.mlp"]
    trainer.save_model(str(tmp_path / "saved"))
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), model)
    assert PruningPlan.load(tmp_path / "saved" / "pruning_plan.json") == expected.plan


def test_the_plan_goes_along_with_what_is_pushed_while_training(tmp_path, monkeypatch):
    """`Trainer` copies weights and config of a checkpoint to where it pushes from, and no other file."""
    callback = PruningCallback(CONFIG, calibration=batches())
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer = trainer_of(tiny_model("llama", dtype=torch.float32), tmp_path, callback, **options)
    pushed = []
    note = lambda self, folder_path, **_: pushed.append(set(os.listdir(folder_path)))  # noqa: E731
    uploads = type("Api", (), {"upload_folder": note})
    monkeypatch.setattr("transformers.trainer.hf_api", uploads)
    monkeypatch.setattr("transformers.trainer.PushInProgress", lambda jobs: None)
    trainer.train()
    trainer.hub_model_id, trainer.push_in_progress = "tester/small", None
    trainer._push_from_checkpoint(str(tmp_path / "checkpoint-2"))
    assert pushed
    assert pushed[0] >= {"config.json", "model.safetensors", "pruning_plan.json", "modeling_hf_prune.py"}
    assert PruningPlan.load(tmp_path / "pruning_plan.json") == trainer.model._pruning_plan


def test_start_takes_a_plan_and_text(tmp_path):
    text = write_text(tmp_path / "text.txt", 300)
    config = WandaConfig(0.3, num_samples=4, seq_len=16)
    tokenizer = tiny_tokenizer(text)
    expected = prune(tiny_model("gpt2", dtype=torch.float32), config, tokenizer=tokenizer, calibration=text)
    by_plan, by_text = (tiny_model("gpt2", dtype=torch.float32) for _ in range(2))
    trainer_of(by_plan, tmp_path, PruningCallback(expected.plan))
    callback = PruningCallback(config, calibration=text)
    Trainer(by_text, arguments(tmp_path), train_dataset=rows(), callbacks=[callback], processing_class=tokenizer)
    assert same(by_plan, expected.model)
    assert same(by_text, expected.model)


def test_report_changes_nothing_and_sees_adapters(tmp_path):
    model = prune(tiny_model("llama", dtype=torch.float32), MagnitudeConfig(0.4)).model
    size = model.num_parameters()
    adapted = add_adapters(model, lora_config(model))
    trainer = trainer_of(adapted, tmp_path, PruningCallback(mode="report"), max_steps=2)
    trainer.train()
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert last["prune/params"] == size
    assert last["prune/sparsity"] == model.config.pruning_config["achieved"]["decoder"]


def test_reporters_see_the_numbers_of_a_bound_callback(tmp_path):
    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    callback = PruningCallback(MagnitudeConfig(0.4))
    trainer = Trainer(
        tiny_model("llama", dtype=torch.float32),
        arguments(tmp_path, max_steps=1),
        train_dataset=rows(),
        callbacks=[Reporter(), callback],
    )
    callback.bind(trainer)
    assert trainer.callback_handler.callbacks.count(callback) == 1
    trainer.train()
    assert all("prune/sparsity" in logs for logs in seen if "loss" in logs)


# --- gradual ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rescore", [True, False])
def test_gradual_ends_in_a_small_model_that_computes_what_was_trained(tmp_path, rescore):
    model = tiny_model("llama")
    callback = gradual(rescore=rescore)
    spy = Spy(callback)
    trainer = trainer_of(model, tmp_path, callback)
    trainer.add_callback(spy)
    trained = []

    class Last(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trained.append(logits(kwargs["model"].eval()))

    trainer.add_callback(Last())
    trainer.train()
    dense = tiny_model("llama").num_parameters()
    plans = [plan for plan in spy.plans if plan is not None]
    ratios = [plan.achieved["decoder"] for plan in plans]
    assert ratios == sorted(ratios)
    assert 0 < ratios[0] < ratios[-1] == pytest.approx(0.4, abs=0.03)
    for early, late in itertools.pairwise(plans):
        for axis in early.num_units:
            assert set(gone_units(early, axis)) <= set(gone_units(late, axis))
    assert model.num_parameters() == plans[-1].num_parameters(shared_structure("llama")) < dense
    assert model.config.pruning_config["settings"] == CONFIG.to_dict()
    torch.testing.assert_close(logits(model.eval()), trained[-1], rtol=1e-9, atol=1e-9)
    changes = [entry for entry in trainer.state.log_history if "prune/layers.0.mlp" in entry]
    assert [entry["step"] for entry in changes] == [2, 4, 6, 8]
    trainer.save_model(str(tmp_path / "saved"))
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), model)
    trainer.train()  # goes on as the training of a small model
    assert callback.plan == plans[-1]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("allocation", ["uniform", "global", "spectral", {"mlp": 2, "attention": 1}])
def test_a_model_that_does_not_change_ends_as_if_pruned_at_once(tmp_path, family, allocation):
    """Norms of units do not change when others are masked. (All settings of the steps: `test_steps`.)"""
    standardise, schedule = (
        ("none", "cubic") if (family == "gpt2") == (allocation == "global") else ("zscore", "linear")
    )
    axes = ("mlp",) if allocation == "global" else ("mlp", "attention")
    config = MagnitudeConfig(0.4, axes=axes, allocation=allocation, standardise=standardise)
    if axes == ("mlp",):
        config = dataclasses.replace(config, pruning_ratio=0.3)
    model, expected = tiny_model(family), prune(tiny_model(family), config)
    callback = PruningCallback(config, "gradual", end_step=6, every=1, schedule=schedule)
    trainer_of(model, tmp_path, callback, learning_rate=0.0, optim="sgd").train()
    assert callback.plan == expected.plan
    assert same(model, expected.model)


def test_training_masked_units_is_training_without_them(tmp_path):
    """Adam's moments, weight decay and gradient clipping: masked for good at step 2, or cut there."""
    options = {"weight_decay": 0.1, "max_grad_norm": 0.1}
    by_mask, by_cut = tiny_model("llama"), tiny_model("llama")
    trainer_of(by_mask, tmp_path, gradual(end_step=2, every=2), **options).train()
    cut = PruningCallback(CONFIG, "cut", calibration=batches(), begin_step=2)
    trainer_of(by_cut, tmp_path, cut, **options).train()
    left, right = by_mask.state_dict(), by_cut.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-7, atol=1e-9)


def test_an_early_end_still_gives_the_asked_ratio(tmp_path):
    model, callback = tiny_model("llama", dtype=torch.float32), gradual(end_step=8)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    trainer = trainer_of(model, tmp_path, callback)
    trainer.add_callback(Stop())
    trainer.train()
    assert callback.plan.achieved["decoder"] == pytest.approx(0.4, abs=0.03)
    assert model.num_parameters() == callback.plan.num_parameters(shared_structure("llama"))


# --- checkpoints and resume -------------------------------------------------------------------------------------------


def make_callback(mode, rescore=True):
    if mode == "gradual":
        return gradual(rescore=rescore)
    return PruningCallback(CONFIG, mode, calibration=batches(), begin_step=3 if mode == "cut" else 0)


@pytest.mark.parametrize(
    ("mode", "rescore", "restore"),
    [("start", True, True), ("gradual", True, True), ("gradual", True, False), ("gradual", False, True), ("cut", 1, 0)],
)
def test_a_killed_run_resumes_exactly(tmp_path, mode, rescore, restore):
    options = {"save_strategy": "steps", "save_steps": 4, "restore_callback_states_from_checkpoint": bool(restore)}
    whole = tiny_model("llama", dtype=torch.float32)
    full = trainer_of(whole, tmp_path / "whole", make_callback(mode, rescore), **options)
    full.train()

    killed = trainer_of(
        tiny_model("llama", dtype=torch.float32), tmp_path / "killed", make_callback(mode, rescore), **options
    )
    killed.add_callback(Spy(stop_at=5))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    checkpoint = tmp_path / "killed" / "checkpoint-4"
    model = tiny_model("llama", dtype=torch.float32)
    if mode == "cut":
        align_to_checkpoint(model, checkpoint)
    resumed = trainer_of(model, tmp_path / "killed", make_callback(mode, rescore), **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert same(model, whole)
    assert model.config.to_dict() == whole.config.to_dict()
    kept = [name for name in full.state.log_history[-1] if name.startswith("prune/")]
    assert kept
    assert [full.state.log_history[-1][name] for name in kept] == [resumed.state.log_history[-1][n] for n in kept]


def test_a_pruned_checkpoint_resumes_from_its_own_model(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4}
    whole = tiny_model("llama", dtype=torch.float32)
    trainer_of(whole, tmp_path, make_callback("start"), **options).train()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4", dtype=torch.float32)
    trainer = trainer_of(model, tmp_path / "again", make_callback("start"), **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same(model, whole)


def test_checkpoints_on_the_way_hold_the_masked_function(tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    callback = gradual()
    trainer = trainer_of(model, tmp_path, callback, save_strategy="steps", save_steps=4)
    trainer.add_callback(Spy(stop_at=4))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer_of(model, tmp_path, None)  # nothing is left behind that another Trainer would meet
    trainer.save_model(str(tmp_path / "checkpoint-4"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4").eval()
    assert loaded.num_parameters() == tiny_model("llama").num_parameters()
    assert torch.equal(logits(loaded), logits(model.eval()))
    with masked(loaded, shared_structure("llama"), callback.plan):
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


def test_state_is_json_and_makes_the_same_callback(tmp_path):
    for callback in (gradual(), PruningCallback(mode="report"), make_callback("cut")):
        state = json.loads(json.dumps(callback.state()))
        again = PruningCallback.from_state(state)
        assert again.state() == callback.state()


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mode": "sometimes"}, "mode: found 'sometimes'"),
        ({"schedule": "square"}, "schedule"),
        ({"every": 0}, "every: found 0"),
        ({"begin_step": -1}, "begin_step"),
        ({"begin_step": 5, "end_step": 5}, "end_step: found 5, expected a whole number from 6"),
        ({"mode": "cut"}, "begin_step: found 0"),
        ({"batch_size": 1.5}, "batch_size"),
    ],
)
def test_settings_are_checked(settings, said):
    with pytest.raises(ConfigError, match=said):
        PruningCallback(MagnitudeConfig(0.3), **{"mode": "gradual"} | settings)


def test_what_is_missing_is_said():
    plan = make_plan(shared_structure("llama"), {"layers.1.mlp": (1, 2)})
    with pytest.raises(ConfigError, match="needs a PruningConfig"):
        PruningCallback()
    with pytest.raises(ConfigError, match="in which order"):
        PruningCallback(plan, "gradual")
    with pytest.raises(ConfigError, match="found str"):
        PruningCallback("magnitude")


@pytest.mark.parametrize(
    ("callback", "options", "error", "said"),
    [
        (lambda: PruningCallback(WandaConfig(0.3)), {}, CalibrationError, "wanda"),
        (lambda: PruningCallback(MagnitudeConfig(0.999), "gradual"), {}, BudgetError, "99"),
        (lambda: PruningCallback(MagnitudeConfig(0.3, axes=("hidden",)), "gradual"), {}, ConfigError, "hidden"),
        (lambda: PruningCallback(MagnitudeConfig(0.3, num_steps=2), "gradual"), {}, ConfigError, "num_steps"),
        (lambda: PruningCallback(MagnitudeConfig(0.3, allocation="search"), "gradual"), {}, ConfigError, "search"),
        (lambda: gradual(end_step=9), {}, ConfigError, "end_step: found 9"),
        (lambda: PruningCallback(MagnitudeConfig(0.3), "cut", begin_step=9), {}, ConfigError, "begin_step: found 9"),
        (
            gradual,
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"},
            ConfigError,
            "load_best_model_at_end",
        ),
        (lambda: PruningCallback(mode="report"), {}, ConfigError, "not"),
    ],
)
def test_refused_before_anything_changes(tmp_path, callback, options, error, said):
    model = tiny_model("llama", dtype=torch.float32)
    with pytest.raises(error, match=said):
        Trainer(
            model,
            arguments(tmp_path, **options),
            train_dataset=rows(),
            eval_dataset=rows(4),
            callbacks=[callback()],
        ).train()
    assert same(model, tiny_model("llama", dtype=torch.float32))


@pytest.mark.parametrize("launched", ["DDP", "FSDP", "DeepSpeed"])
@pytest.mark.parametrize("mode", ["cut", "gradual"])
def test_cutting_inside_of_a_wrapped_run_is_refused(tmp_path, monkeypatch, launched, mode):
    monkeypatch.setattr(callback_module, "distributed_kind", lambda args: launched)
    if (mode, launched) == ("gradual", "DDP"):
        trainer_of(tiny_model("llama", dtype=torch.float32), tmp_path, make_callback(mode))
        return
    with pytest.raises(ConfigError, match=f"mode '{mode}' cannot work under {launched}"):
        trainer_of(tiny_model("llama", dtype=torch.float32), tmp_path, make_callback(mode))


def test_a_model_made_anew_by_the_trainer_is_noticed(tmp_path):
    trainer = Trainer(
        model_init=lambda: tiny_model("llama", dtype=torch.float32),
        args=arguments(tmp_path),
        train_dataset=rows(),
        callbacks=[make_callback("start")],
    )
    with pytest.raises(ConfigError, match="model_init"):
        trainer.train()


def test_adapters_come_after_pruning(tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    with pytest.raises(StructureError, match="prune first"):
        trainer_of(add_adapters(model, lora_config(model)), tmp_path, make_callback("start"))


def test_align_needs_a_plan(tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no pruning plan"):
        align_to_checkpoint(model, tmp_path)
