"""LoRA, distillation, the guard, `recover` and its command: laws on tiny models, exact resume, whole checkpoints."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from functools import partial

import pytest
import tiny
import torch
import torch.nn.functional as F
from models import logits, make_plan, shared_model, shared_structure, tiny_model, token_ids
from test_recovery_callback import arguments, rows, same
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback
from typer.testing import CliRunner

import hf_prune
from hf_prune import (
    DistillationTrainer,
    DivergenceGuard,
    MagnitudeConfig,
    PrunedModelForCausalLM,
    apply_plan,
    lora_config,
    merge_adapters,
    prune,
    recover,
)
from hf_prune.calibration import training_windows
from hf_prune.checkpoint.files import load_plan
from hf_prune.checkpoint.saving import save_pruned
from hf_prune.cli.main import app
from hf_prune.data import load_text
from hf_prune.errors import CalibrationError, CheckpointError, ConfigError, DivergenceError, StructureError
from hf_prune.layers import losses
from hf_prune.loading import load_model
from hf_prune.recovery import teacher as teacher_module
from hf_prune.recovery.arguments import (
    PRESETS,
    Preset,
    distillation_rate,
    parse_training_options,
    read_tokens,
    training_arguments,
)
from hf_prune.recovery.distillation import _ByRows, _kl
from hf_prune.recovery.lora import add_adapters, linear_members
from hf_prune.recovery.teacher import TaughtRows, _most_likely, top_k_divergence, write_predictions

# --- LoRA -------------------------------------------------------------------------------------------------------------

LINEAR = {
    "llama": 7 * 3,
    "gpt2": 4 * 3,
    "phi3": 4 * 2,
    "gpt_neox": 4 * 2,
    "bloom": 4 * 3,
    "mixtral": 6 * 2,  # two of the six are stacked matrices of experts
    "opt": 6 * 3,
}


@pytest.mark.parametrize("family", LINEAR)
def test_adapters_sit_on_every_linear_module_of_attention_and_mlp(family):
    model = tiny_model(family)
    structure = shared_structure(family)
    kept = {"layers.0.attention": (0, 2) if family == "opt" else (0,), "layers.1.attention": (0, 1)}
    plan = make_plan(structure, kept)
    pruned = apply_plan(model, structure, plan)
    before = logits(pruned)
    adapted = add_adapters(pruned, lora_config(pruned, lora_dropout=0.0))
    found = [path for path, module in adapted.named_modules() if hasattr(module, "lora_A")]
    assert len(found) == LINEAR[family]
    assert not any("embed" in path or "lm_head" in path for path in found)
    trainable = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    assert torch.equal(logits(adapted), before)  # B starts at zero
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    expected = logits(adapted)
    assert not torch.allclose(expected, before, atol=1e-3)
    merged = merge_adapters(adapted)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-9, atol=1e-9)
    assert type(merged) is type(model)
    assert merged.config.pruning_config == pruned.config.pruning_config
    assert merged._pruning_plan == plan
    assert merged.state_dict().keys() == apply_plan(model, structure, plan).state_dict().keys()
    assert all(parameter.requires_grad for parameter in merged.parameters())


def test_the_preset_is_the_papers_and_can_be_overridden():
    model = tiny_model("llama")
    config = lora_config(model)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (8, 16, 0.05, "none")
    assert config.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert not config.fan_in_fan_out
    assert lora_config(tiny_model("gpt2")).fan_in_fan_out
    assert lora_config(model, r=4, target_modules=["q_proj"]).target_modules == {"q_proj"}
    with pytest.raises(ConfigError, match="preset"):
        lora_config(model, preset="alpaca")
    with pytest.raises(ConfigError, match="rank"):
        lora_config(model, rank=4)
    mixture = lora_config(tiny_model("mixtral"))
    assert mixture.target_parameters == ["experts.down_proj", "experts.gate_up_proj"]
    assert mixture.lora_dropout == 0
    with pytest.raises(ConfigError, match=r"lora_dropout: found 0.05, expected 0"):
        lora_config(tiny_model("mixtral"), lora_dropout=0.05)


def test_adapters_start_from_their_seed_alone():
    state = torch.get_rng_state()
    first, again, other = (
        add_adapters(model, lora_config(model), seed=seed)
        for model, seed in ((tiny_model("llama"), 1), (tiny_model("llama"), 1), (tiny_model("llama"), 2))
    )
    assert same(first, again)
    assert not same(first, other)
    assert torch.equal(torch.get_rng_state(), state)


# --- distillation -----------------------------------------------------------------------------------------------------


def distiller(student, directory, options=None, **settings):
    return DistillationTrainer(
        student, arguments(directory, **(options or {})), train_dataset=rows(), eval_dataset=rows(4), **settings
    )


def batch(count=4):
    ids = token_ids(count, 10, seed=5)
    labels = ids.clone()
    labels[0, :6] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize(("temperature", "alpha", "hidden_weight"), [(1.0, 1.0, 0.0), (2.0, 0.3, 0.7)])
def test_the_loss_is_the_formula(tmp_path, temperature, alpha, hidden_weight):
    teacher = tiny_model("llama")
    structure = shared_structure("llama")
    student = apply_plan(teacher, structure, make_plan(structure, {"layers": (0, 2), "hidden": tuple(range(0, 48, 2))}))
    settings = {"temperature": temperature, "alpha": alpha, "hidden_weight": hidden_weight}
    trainer = distiller(student, tmp_path, teacher=teacher, **settings)
    inputs = batch()
    found = trainer.compute_loss(student.train(), inputs)
    with torch.no_grad():
        taught = teacher(input_ids=inputs["input_ids"], output_hidden_states=True)
        learnt = student(input_ids=inputs["input_ids"], output_hidden_states=True)
    terms = []
    for row in range(4):
        for position in range(9):
            label = inputs["labels"][row, position + 1]
            if label == -100:
                continue
            p = F.softmax(taught.logits[row, position] / temperature, -1)
            q = F.softmax(learnt.logits[row, position] / temperature, -1)
            kl = temperature**2 * (p * (p / q).log()).sum()
            lm = -learnt.logits[row, position].log_softmax(-1)[label]
            terms.append(((1 - alpha) * lm + alpha * kl, row, position))
    expected = torch.stack([term for term, _, _ in terms]).mean()
    where = [(row, position) for _, row, position in terms]
    for mine, theirs in ((0, 0), (1, 2)):
        target = torch.stack([taught.hidden_states[theirs + 1][row, position, ::2] for row, position in where])
        own = torch.stack([learnt.hidden_states[mine + 1][row, position] for row, position in where])
        relative = (own - target).square().sum(-1) / target.square().sum(-1)
        expected += hidden_weight * 0.5 * relative.mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(tmp_path):
    teacher = tiny_model("llama")
    trainer = distiller(tiny_model("llama").train(), tmp_path, teacher=teacher, alpha=1.0, hidden_weight=1.0)
    loss = trainer.compute_loss(trainer.model, batch())
    assert loss.item() == pytest.approx(0, abs=1e-6)  # the KL is taken in float32
    loss.backward()
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())  # it can be trained afterwards


def test_accumulated_batches_are_one_batch(tmp_path):
    students = [prune(shared_model("llama"), MagnitudeConfig(0.4)).model for _ in range(2)]
    options = {"max_steps": 2, "save_strategy": "no"}
    small = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    settings = {"teacher": tiny_model("llama"), "hidden_weight": 0.5}
    for student, sizes in zip(students, ({}, small), strict=True):
        distiller(student, tmp_path, options | sizes, **settings).train()
    for left, right in zip(*(student.parameters() for student in students), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_the_teacher_teaches_and_stays_as_it_is(tmp_path):
    teacher = tiny_model("llama", dtype=torch.float32)
    student = prune(teacher, MagnitudeConfig(0.4)).model
    teacher.save_pretrained(tmp_path / "teacher")
    options = {"max_steps": 30, "learning_rate": 2e-3}
    trainer = distiller(student, tmp_path, options, teacher=str(tmp_path / "teacher"), alpha=1.0)
    plain = Trainer.compute_loss(trainer, student.eval(), batch()).item()
    assert trainer.evaluate(rows(4))["eval_loss"] > 0
    assert trainer.compute_loss(student.eval(), batch()).item() == plain  # evaluation: the LM loss
    before = trainer.compute_loss(student.train(), batch()).item()
    trainer.train()
    assert trainer.compute_loss(student.train(), batch()).item() < 0.9 * before
    assert same(trainer.teacher, teacher)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"alpha": 1.5}, "alpha"),
        ({"hidden_weight": math.nan}, "hidden_weight"),
        ({"hidden_weight": 1.0, "layer_map": [0, 1]}, "layer_map"),
    ],
)
def test_distillation_settings_are_checked(tmp_path, settings, said):
    with pytest.raises(ConfigError, match=said):
        distiller(tiny_model("llama"), tmp_path, teacher=tiny_model("llama"), **settings)


def test_a_teacher_that_does_not_fit_is_refused(tmp_path):
    other = AutoModelForCausalLM.from_pretrained(tiny.write_checkpoint(tmp_path / "other"))
    with pytest.raises(ConfigError, match="predicts 64 tokens"):
        distiller(tiny_model("llama"), tmp_path, teacher=other)
    with pytest.raises(ConfigError, match="pass a layer_map"):
        distiller(tiny_model("llama"), tmp_path, teacher=tiny_model("mistral"), hidden_weight=1.0)


# --- the guard --------------------------------------------------------------------------------------------------------


class Poison(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            head = kwargs["model"].lm_head.weight
            self.handle = head.register_hook(lambda gradient: gradient * torch.nan)


def test_the_guard_stops_before_a_weight_is_lost(tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    trainer = Trainer(
        model,
        arguments(tmp_path, save_strategy="steps", save_steps=2),
        train_dataset=rows(),
        callbacks=[DivergenceGuard(), Poison(step=5)],
    )
    with pytest.raises(DivergenceError, match=r"step 6: the gradient is not finite.*checkpoint-4.*learning_rate"):
        trainer.train()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_the_guard_sees_the_evaluation_and_repeated_overflow(tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    trainer = Trainer(model, arguments(tmp_path), eval_dataset=rows(4), callbacks=[DivergenceGuard()])
    with pytest.raises(DivergenceError, match="eval_loss is nan"):
        trainer.evaluate()
    guard, args = DivergenceGuard(max_overflows=2), arguments(tmp_path)
    scaled = type("Scaled", (), {"scaler": object()})()
    model.lm_head.weight.grad = torch.full_like(model.lm_head.weight, torch.inf)
    for _ in range(2):  # the loss scaler skips these steps
        guard.on_pre_optimizer_step(args, trainer.state, trainer.control, model=model, optimizer=scaled)
    with pytest.raises(DivergenceError, match="3 steps in a row"):
        guard.on_pre_optimizer_step(args, trainer.state, trainer.control, model=model, optimizer=scaled)
    with pytest.raises(ConfigError, match="max_overflows"):
        DivergenceGuard(0)


# --- recover ----------------------------------------------------------------------------------------------------------

QUICK = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True, "disable_tqdm": True}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A dense model, a pruned one with layers of different widths, and two texts."""
    folder = tmp_path_factory.mktemp("recover")
    tiny.write_checkpoint(folder / "dense")
    tiny.write_text(folder / "train.txt", 2000, seed=1)
    tiny.write_text(folder / "eval.txt", 300, seed=2)
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense")
    tokenizer = AutoTokenizer.from_pretrained(folder / "dense")
    result = prune(dense, MagnitudeConfig(0.3, allocation="global"))
    PrunedModelForCausalLM.save_pretrained(result.model, folder / "pruned", plan=result.plan, tokenizer=tokenizer)
    return folder


def quick(material, output, **settings):
    texts = {"train": material / "train.txt", "eval": material / "eval.txt"}
    return recover(material / "pruned", output, **{**texts, "steps": 6, "seq_len": 16, **QUICK, **settings})


def test_recover_makes_one_checkpoint_that_loads(material, tmp_path):
    result = quick(material, tmp_path / "out", steps=20)
    assert result.perplexity_after < result.perplexity_before
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same(loaded, result.model)
    assert load_plan(tmp_path / "out") == load_plan(material / "pruned")
    assert loaded.config.use_cache
    start = AutoModelForCausalLM.from_pretrained(material / "pruned")
    changed = {n for n, p in loaded.named_parameters() if not torch.equal(p, start.get_parameter(n))}
    assert changed
    assert all("proj" in name for name in changed)  # adapters were merged, nothing else was trained
    # the numbers are those of `perplexity`, and are on the card
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = load_text(material / "eval.txt")
    measured = hf_prune.perplexity(loaded, tokenizer, text, window=16, progress=False).perplexity
    assert result.perplexity_after == pytest.approx(measured, rel=1e-4)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{result.perplexity_before:.4g}" in card
    assert f"{result.perplexity_after:.4g}" in card
    entry = next(entry for entry in result.log_history if "loss" in entry)
    assert entry["prune/params"] == start.num_parameters()


def test_a_fresh_process_loads_it_with_and_without_the_plugin(material, tmp_path):
    result = quick(material, tmp_path / "out", preset="full")
    ids = torch.arange(3, 15)[None]
    torch.save(logits(result.model.eval(), ids), tmp_path / "logits.pt")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM;"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/out', trust_remote_code={trust}).eval();"
        "assert torch.equal(model(input_ids=torch.arange(3, 15)[None]).logits, torch.load(sys.argv[1] + '/logits.pt'));"
        "assert ('hf_prune' in sys.modules) != {trust}"
    )
    for first, trust in (("import hf_prune; ", False), ("", True)):
        subprocess.run(
            [sys.executable, "-c", first + code.replace("{trust}", str(trust)), str(tmp_path)], check=True, timeout=120
        )


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "settings", [{}, {"preset": "distill", "teacher": True}, {"preset": "norms"}], ids=["lora", "distillation", "norms"]
)
def test_a_killed_recovery_resumes_to_the_same_bits(material, tmp_path, monkeypatch, settings):
    settings = settings | ({"teacher": material / "dense"} if "teacher" in settings else {})
    settings |= {"steps": 8, "save_steps": 2}
    whole = quick(material, tmp_path / "whole", **settings)
    from hf_prune.recovery import recover as module

    with monkeypatch.context() as patched:
        callbacks = module._callbacks
        patched.setattr(module, "_callbacks", lambda model: [*callbacks(model), Kill()])
        with pytest.raises(KeyboardInterrupt):
            quick(material, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="resume"):
        quick(material, tmp_path / "out", **settings)
    resumed = quick(material, tmp_path / "out", resume=True, **settings)
    assert same(resumed.model, whole.model)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    assert resumed.perplexity_after == whole.perplexity_after


def test_the_best_checkpoint_is_the_result(material, tmp_path):
    # a learning rate that is kind at first and ruinous later
    result = quick(
        material,
        tmp_path / "out",
        preset="full",
        steps=6,
        learning_rate=1.0,
        warmup_steps=6,
        save_steps=1,
        eval_steps=1,
    )
    losses = [entry["eval_text_loss"] for entry in result.log_history if "eval_text_loss" in entry]
    assert min(losses[:-1]) < losses[-2]
    assert result.perplexity_after == pytest.approx(math.exp(min(losses)), rel=1e-5)


def test_rows_and_dense_models_are_taken_too(tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    result = recover(model, tmp_path / "out", train=rows(), preset="full", steps=2, **QUICK)
    assert result.model is model
    assert result.perplexity_before is None
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), model)
    assert not same(model, tiny_model("llama", dtype=torch.float32))


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"learning_rat": 1.0}, ConfigError, "learning_rat"),
        ({"output_dir_": 1.0}, ConfigError, "output_dir_"),
        ({"max_steps": 3}, ConfigError, "max_steps: say this by steps or tokens"),
        ({"steps": 0}, ConfigError, "steps: found 0"),
        ({"tokens": 100}, ConfigError, "leave out one"),
        ({"preset": "lore"}, ConfigError, "preset: found 'lore'"),
        ({"preset": "full", "lora": object()}, ConfigError, "trains no adapters"),
        ({"lora": False}, ConfigError, "preset 'full' trains all weights"),
        ({"teacher_cache": "cache"}, ConfigError, "no teacher"),
        ({"preset": "distill", "teacher": "no/such-teacher"}, CheckpointError, "no/such-teacher"),
        ({"seq_len": 1}, ConfigError, "seq_len"),
        ({"seq_len": 5000}, CalibrationError, "tokens"),
        ({"train": "nothing.txt"}, CalibrationError, "no file"),
        ({"train": []}, ConfigError, "row"),
        ({"eval_strategy": "sometimes"}, ConfigError, "sometimes"),
        ({"teacher": "no/such-teacher"}, CheckpointError, "no/such-teacher"),
    ],
)
def test_bad_input_is_refused_before_training(material, tmp_path, settings, error, said):
    with pytest.raises(error, match=said):
        quick(material, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_windows_that_the_model_has_no_positions_for_are_refused(material, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(material / "dense")
    model, options = tiny_model("gpt2", dtype=torch.float32), {"tokenizer": tokenizer, "steps": 1}
    with pytest.raises(ConfigError, match="65 tokens long, but the model has 64 positions"):
        recover(model, tmp_path / "out", train=material / "train.txt", seq_len=65, **options, **QUICK)


def test_a_directory_in_the_way_is_noticed_before_training(material, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match=r"thesis\.tex"):
        quick(material, tmp_path / "out")
    assert not (tmp_path / "out-training").exists()


# --- the command ------------------------------------------------------------------------------------------------------


def test_options_of_training_pass_through():
    words = (
        "--learning-rate 1e-3 --weight_decay 0.1 --bf16 --optim adafactor --no-dataloader-pin-memory --warmup-steps 5"
    )
    assert parse_training_options(words.split()) == {
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "bf16": True,
        "optim": "adafactor",
        "dataloader_pin_memory": False,
        "warmup_steps": 5,
    }
    assert parse_training_options([]) == {}
    for words, said in (
        (["--learning-rat", "1"], "--learning-rat"),
        (["--learning-rate", "fast"], "fast"),
        (["stray"], "stray"),
        (["--fsdp-config", "{"], "JSON"),
    ):
        with pytest.raises(ConfigError, match=said):
            parse_training_options(words)


def test_defaults_are_the_papers_and_options_win(tmp_path):
    common = {"seq_len": 16, "evaluates": True, "chooses": True}
    args = training_arguments(tmp_path, {"use_cpu": True}, preset="lora", steps=2000, **common)
    assert (args.learning_rate, args.warmup_steps, args.max_steps) == (1e-4, 100, 2000)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 64
    assert args.load_best_model_at_end
    assert args.eval_steps == args.save_steps == 200
    options = {"use_cpu": True, "per_device_train_batch_size": 3}
    args = training_arguments(tmp_path, options, preset="full", tokens=10 * 3 * 16 - 1, **common)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.max_steps) == (3, 1, 10)


def test_the_command_recovers(material, tmp_path):
    command = ["recover", material / "pruned", tmp_path / "out", "--train", material / "train.txt"]
    command += ["--eval", material / "eval.txt", "--preset", "full", "--teacher", material / "dense", "--steps", 4]
    command += ["--seq-len", 16, "--learning-rate", "1e-2", "--per-device-train-batch-size", 4, "--use-cpu"]
    command += ["--temperature", 2, "--teacher-cache", tmp_path / "cache", "--trust-remote-code", "--other", "none"]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(word) for word in command])
    assert result.exit_code == 0, (result.output, result.exception)
    assert "perplexity before" in result.stdout
    assert "perplexity after" in result.stdout
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.pruning_config
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    again = next(line for line in card.splitlines() if line.startswith("hf-prune recover"))
    for words in (f"--teacher {material / 'dense'}", "--temperature 2.0", "--teacher-cache", "--other none"):
        assert words in again
    assert again.endswith("--trust-remote-code")


def test_the_command_says_what_is_wrong(material, tmp_path):
    for command, said in (
        ([material / "pruned", tmp_path / "out", "--train", material / "train.txt", "--learning-rat", "1"], "rat"),
        (["--bf16", material / "pruned", tmp_path / "out", "--train", material / "train.txt"], "come first"),
    ):
        result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["recover", *map(str, command)])
        assert result.exit_code == 2
        assert said in result.stderr


NAMES = ("Linear", "FalconLinear")


def test_one_kv_head_has_targets_too():
    for family in ("falcon", "falcon_mqa", "glm4"):
        paths = linear_members(shared_model(family), shared_structure(family))
        linear = [path for path, module in shared_model(family).named_modules() if type(module).__name__ in NAMES]
        assert paths == [path for path in linear if path != "lm_head"]
    with pytest.raises(StructureError, match="preset 'full'"):
        linear_members(torch.nn.Module(), shared_structure("llama"))


# --- presets, mixtures, what the teacher predicts ---------------------------------------------------------------------


def test_norms_alone_are_trained_by_their_preset(material, tmp_path):
    result = quick(material, tmp_path / "out", preset="norms", steps=4)
    start = AutoModelForCausalLM.from_pretrained(material / "pruned")
    changed = {n for n, p in result.model.named_parameters() if not torch.equal(p, start.get_parameter(n))}
    assert changed == {name for name, p in start.named_parameters() if p.ndim == 1}
    assert all(parameter.requires_grad for parameter in result.model.parameters())


def test_the_learning_rate_is_for_size_and_cut(material, tmp_path):
    assert distillation_rate(8 * 10**9, 0.5) == pytest.approx(1e-4, rel=0.01)  # Minitron's
    assert distillation_rate(10**8, 0.5) == 2 * distillation_rate(16 * 10**8, 0.5)
    assert distillation_rate(10**8, 0.125) == pytest.approx(distillation_rate(10**8, 0.5) / 2)
    options = {name: value for name, value in QUICK.items() if name != "learning_rate"}
    texts = {"train": material / "train.txt", "teacher": material / "dense", "other": None}
    result = recover(material / "pruned", tmp_path / "out", preset="distill", steps=2, seq_len=16, **texts, **options)
    plan = load_plan(material / "pruned")
    expected = distillation_rate(result.model.num_parameters(), plan.achieved["decoder"])
    rates = [entry["learning_rate"] for entry in result.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([0, expected])  # after the one step of warm-up
    for text, number in (("500", 500), ("2M", 2 * 10**6), ("1.5k", 1500), ("0.1B", 10**8)):
        assert read_tokens(text) == number
    for text in ("", "0", "many", "-1", "2MB"):
        with pytest.raises(ConfigError, match="tokens: found"):
            read_tokens(text)


def test_the_dense_model_is_found_from_the_checkpoint(tmp_path):
    tiny.write_checkpoint(tmp_path / "dense")
    tiny.write_text(tmp_path / "train.txt", 500, seed=1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dense")
    pruned = prune(tmp_path / "dense", MagnitudeConfig(0.3))
    save_pruned(pruned.model, tmp_path / "pruned", plan=pruned.plan, tokenizer=tokenizer)
    options = {"train": tmp_path / "train.txt", "preset": "distill", "steps": 2, "seq_len": 16, "other": None, **QUICK}
    named = recover(tmp_path / "pruned", tmp_path / "named", teacher=tmp_path / "dense", **options)
    assert same(recover(tmp_path / "pruned", tmp_path / "found", **options).model, named.model)


@pytest.mark.parametrize("top_k", [1, 5, 64])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_divergence_of_the_likeliest_is_a_bound_and_exact_with_all(top_k, temperature):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(7, 64, generator=generator) for _ in range(2))
    full = _kl(student, teacher, temperature)
    found = top_k_divergence(student, *_most_likely(teacher, temperature, top_k), temperature=temperature)
    assert 0 < found <= full * (1 + 1e-3)
    p, q = ((logits / temperature).softmax(-1) for logits in (teacher, student))
    first = p.topk(top_k).indices
    p, q = (torch.cat([own.gather(-1, first), 1 - own.gather(-1, first).sum(-1, True)], -1) for own in (p, q))
    p, q = (own if top_k < 64 else own[:, :-1] for own in (p, q))
    torch.testing.assert_close(found, temperature**2 * (p * (p / q).log()).sum(), rtol=5e-3, atol=5e-3)
    if top_k == 64:
        torch.testing.assert_close(found, full, rtol=1e-3, atol=1e-3)
    else:
        assert found < 0.99 * full
    equal = top_k_divergence(teacher, *_most_likely(teacher, temperature, top_k), temperature=temperature)
    assert equal.item() == pytest.approx(0, abs=2e-2)  # log-probabilities are kept in half precision


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [0, 7, 23])
def test_the_divergence_by_rows_is_that_of_all_rows_with_its_gradient(monkeypatch, dtype, count):
    monkeypatch.setattr(losses, "CACHED_ELEMENTS", 5 * 64)  # five rows at a time
    generator = torch.Generator().manual_seed(0)
    learnt, teacher = ((3 * torch.randn(23, 64, generator=generator)).to(dtype) for _ in range(2))
    positions = torch.randperm(23, generator=generator)[:count].sort().values
    wide = torch.promote_types(dtype, torch.float32)
    likely = _most_likely(teacher, 2.0, 5)
    for loss_of, taught in ((_kl, (teacher,)), (top_k_divergence, likely)):
        own, whole = (learnt.clone().requires_grad_() for _ in range(2))
        found = _ByRows.apply(own, positions, partial(loss_of, temperature=2.0), *taught)
        expected = loss_of(whole[positions].to(wide), *(known[positions] for known in taught), temperature=2.0)
        assert found.dtype == wide
        torch.testing.assert_close(found, expected.to(wide))
        (3 * found).backward()
        (3 * expected).backward()
        torch.testing.assert_close(own.grad, whole.grad if count else torch.zeros_like(own))


def test_a_student_that_learns_from_its_teacher_alone_takes_no_loss_of_the_text(tmp_path):
    student = prune(shared_model("llama"), MagnitudeConfig(0.4)).model.train()
    asked = []
    student.register_forward_pre_hook(lambda module, args, kwargs: asked.append("labels" in kwargs), with_kwargs=True)
    for alpha in (1.0, 0.5):
        distiller(student, tmp_path, teacher=tiny_model("llama"), alpha=alpha).compute_loss(student, batch())
    assert asked == [False, True]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_written_predictions_are_the_teachers(tmp_path, family):
    teacher = tiny_model(family, dtype=torch.float32).eval()
    windows = token_ids(19, 12, seed=3)
    write_predictions(teacher, windows, tmp_path / "taught", top_k=3)
    order = [18, 0, 7]
    rows = TaughtRows([{"input_ids": windows[n], "labels": windows[n]} for n in order], order, tmp_path / "taught")
    with torch.no_grad():
        log_p = teacher(input_ids=windows).logits.log_softmax(-1)
    for row, window in zip(rows, (18, 0, 7), strict=False):
        values, tokens = log_p[window].topk(3)
        assert torch.equal(row["teacher_tokens"].long(), tokens)
        torch.testing.assert_close(row["teacher_log_probs"].float(), values, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(row["teacher_rest"].exp(), 1 - values.exp().sum(-1), rtol=1e-3, atol=1e-4)


def test_written_predictions_teach_as_the_teacher_does_and_are_written_once(material, tmp_path, monkeypatch):
    options = {"preset": "distill", "teacher": str(material / "dense"), "steps": 4, "optim": "sgd"}
    beside = quick(material, tmp_path / "beside", **options)
    monkeypatch.setattr(teacher_module, "TOP_K", 64)  # the whole vocabulary
    before = quick(material, tmp_path / "before", teacher_cache=tmp_path / "taught", **options)
    for left, right in zip(before.model.parameters(), beside.model.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-2, atol=1e-3)
    (tmp_path / "taught" / "000001.safetensors").unlink()  # as if a run had been killed
    gone = []
    monkeypatch.setattr(teacher_module, "open_model", lambda *a, **k: gone.append(1) or load_model(*a))
    again = quick(material, tmp_path / "again", teacher_cache=tmp_path / "taught", **options)
    assert same(again.model, before.model)
    once_more = quick(material, tmp_path / "once more", teacher_cache=tmp_path / "taught", **options)
    assert same(once_more.model, before.model)
    assert gone == [1]  # all was there: the teacher was not loaded
    other = {**options, "train": material / "eval.txt", "eval": material / "train.txt"}
    with pytest.raises(CheckpointError, match="of another run: text"):
        quick(material, tmp_path / "other", teacher_cache=tmp_path / "taught", **other)


@pytest.mark.parametrize("cached", [False, True])
def test_only_answers_teach_where_that_is_asked(material, tmp_path, cached):
    tokenizer = AutoTokenizer.from_pretrained(material / "dense")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    words = (material / "train.txt").read_text().split()
    chats = [{"prompt": " ".join(words[i : i + 9]), "completion": " ".join(words[i + 9 : i + 20])} for i in range(400)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    windows = training_windows(tokenizer, tmp_path / "chats.jsonl", 16, assistant_only_loss=True)
    assert 0.3 < (windows < 0).float().mean() < 0.7
    rows = [{"input_ids": w.where(w >= 0, ~w), "labels": w.where(w >= 0, -100)} for w in windows]
    options = {"preset": "distill", "alpha": 0.5, "teacher": str(material / "dense"), "tokenizer": tokenizer}
    taught = {"teacher_cache": tmp_path / "taught"} if cached else {}
    chat = {"train": tmp_path / "chats.jsonl", "assistant_only_loss": True}
    found = quick(material, tmp_path / "found", **chat, **options, **taught)
    expected = quick(material, tmp_path / "expected", train=rows, **options)
    assert same(found.model, expected.model) or cached
    for left, right in zip(found.model.parameters(), expected.model.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-2, atol=1e-3)
    with pytest.raises(CalibrationError, match="found no chat"):
        quick(material, tmp_path / "plain", assistant_only_loss=True)


def test_a_mixture_is_trained_on_by_its_shares(material, tmp_path, caplog):
    sources = {str(material / "train.txt"): 3.0, str(material / "eval.txt"): 1.0}
    tokenizer = AutoTokenizer.from_pretrained(material / "dense")
    every = {name: {tuple(w.tolist()) for w in training_windows(tokenizer, name, 16)} for name in sources}
    windows = training_windows(tokenizer, sources, 16, number=128)
    counts = [sum(tuple(w.tolist()) in every[name] for w in windows) for name in sources]
    assert counts == [96, 32]
    assert "sum to 4" in caplog.text
    short = [tuple(w.tolist()) for w in windows if tuple(w.tolist()) in every[str(material / "eval.txt")]]
    assert len(set(short)) == 18 == len(every[str(material / "eval.txt")])  # all, before any comes again
    assert len(training_windows(tokenizer, sources, 16)) == 18 * 4
    result = quick(material, tmp_path / "out", train=sources, steps=3)
    assert result.log_history[-1]["step"] == 3
    training_windows(tokenizer, sources, 16, number=512)
    assert "is trained on 7.1 times" in caplog.text


def test_a_model_that_gets_worse_on_another_text_says_so(material, tmp_path, caplog):
    ruin = {"preset": "full", "steps": 6, "learning_rate": 1.0}
    result = quick(material, tmp_path / "out", other=material / "eval.txt", eval=None, **ruin)
    assert result.perplexity_after is None
    assert result.other_after > result.other_before
    assert "text of another kind than was trained on went from" in caplog.text
    caplog.clear()
    result = quick(material, tmp_path / "fine", other=material / "eval.txt", eval=None, steps=6)
    assert result.other_after < result.other_before
    assert "another kind" not in caplog.text


def test_one_command_from_dense_to_recovered_goes_on_after_a_kill(tmp_path, monkeypatch):
    tiny.write_checkpoint(tmp_path / "dense")
    tiny.write_text(tmp_path / "train.txt", 600, seed=1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_prune.recovery.arguments.PRESETS", PRESETS | {"distill": Preset("all", None, 8)})
    command = "prune dense out --method magnitude --pruning-ratio 0.3 --calibration train.txt --recover 4k --device cpu"
    command = command.split()
    killed = []

    class Once(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2 and not killed:
                killed.append(1)
                raise KeyboardInterrupt

    from hf_prune.recovery import recover as module

    callbacks = module._callbacks
    monkeypatch.setattr(module, "_callbacks", lambda model: [*callbacks(model), Once()])
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 130, run.output
    assert not (tmp_path / "out").exists()
    assert load_plan("out-pruned").achieved["decoder"] > 0.29
    monkeypatch.setattr("hf_prune.cli.pruning.prune", lambda *_, **__: pytest.fail("pruned again"))
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 0, run.output
    assert "other after" in run.stdout
    assert load_plan("out") == load_plan("out-pruned")
    assert not (tmp_path / "out-training").exists()  # it would refuse the next run, and is several times the model
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(f"| {name} |" in card for name in ("dense", "before recovery", "after recovery"))
    assert "hf-prune recover out-pruned out" in card
    assert not same(*(AutoModelForCausalLM.from_pretrained(path) for path in ("out", "out-pruned")))
    for words, said in ((["--recover", "much"], "tokens: found"), (["--calibration", "self"], "found 'self'")):
        run = CliRunner().invoke(app, [*command, *words, "--overwrite"])
        assert run.exit_code == 2
        assert said in run.output


def test_half_precision_weights_are_trained_in_single_and_saved_as_they_were(material, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(material / "pruned", dtype=torch.bfloat16)
    plan, tokenizer = load_plan(material / "pruned"), AutoTokenizer.from_pretrained(material / "pruned")
    save_pruned(model, tmp_path / "half", plan=plan, tokenizer=tokenizer)
    texts = {"train": material / "train.txt", "other": None}
    options = {"preset": "full", "steps": 40, "seq_len": 16, **QUICK, "learning_rate": 5e-6, "warmup_steps": 0}
    result = recover(tmp_path / "half", tmp_path / "out", **texts, **options)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert saved.dtype == result.model.dtype == torch.bfloat16
    start = model.get_input_embeddings().weight
    moved = (saved.get_input_embeddings().weight != start).float().mean()
    assert moved > 0.15  # steps that each are lost in bfloat16 add up


@pytest.mark.parametrize("preset", ["full", "norms", "lora", "distill"])
def test_the_price_of_training_is_what_it_takes(material, tmp_path, monkeypatch, caplog, preset):
    from hf_prune.recovery import recover as module

    counted, sizes, step = [], [], Trainer.training_step

    def steps(*args):
        with FlopCounterMode(display=False) as counter:
            loss = step(*args)
        counted.append(counter.get_total_flops())
        return loss

    def removed(folder):
        files = next(folder.glob("checkpoint-*")).iterdir()
        sizes.extend(file.stat().st_size for file in files if file.suffix in (".safetensors", ".pt"))

    monkeypatch.setattr(Trainer, "training_step", steps)
    monkeypatch.setattr(module, "remove_checkpoints", removed)
    caplog.set_level("INFO", "hf_prune")
    quick(material, tmp_path / "out", preset=preset, teacher=material / "dense" if preset == "distill" else None)
    said = r"trains on 384 tokens in 6 steps, .* (\S+) TFLOP, and writes checkpoints of (\S+) GB"
    found = re.search(said, caplog.text)
    assert 0.8 < 1e12 * float(found[1]) / sum(counted) <= 1.1
    assert 1e9 * float(found[2]) == pytest.approx(sum(sizes), rel=0.02, abs=30_000)  # headers
