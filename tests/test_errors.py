"""Bad input (docs/design.md) at the public entry points: the right error, all said, nothing changed."""

from __future__ import annotations

import contextlib
import errno
import shutil

import pytest
import torch
from models import logits, make_plan, shared_structure, tiny_model, tiny_tokenizer, token_ids, write_text

import hf_prune
import hf_prune.scores
from hf_prune import (
    MagnitudeConfig,
    PrunedModelForCausalLM,
    PruningConfig,
    PruningPlan,
    RandomConfig,
    WandaConfig,
    apply_plan,
    prune,
)
from hf_prune.errors import (
    BudgetError,
    CalibrationError,
    CheckpointError,
    ConfigError,
    HFPruneError,
    PlanError,
    ScoreError,
    StructureError,
)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "calibration.txt", 240)


@pytest.fixture(scope="module")
def tokenizer(text):
    return tiny_tokenizer(text)


@contextlib.contextmanager
def refused(error_class, *said, model=None):
    """Expect `error_class` whose message says all of `said`, and `model` untouched."""
    before = snapshot(model)
    with pytest.raises(error_class) as caught:
        yield
    assert isinstance(caught.value, HFPruneError)
    assert isinstance(caught.value, ValueError)
    message = str(caught.value)
    for words in said:
        assert words in message, message
    assert message == message.strip()
    assert snapshot(model) == before


def snapshot(model):
    if model is None:
        return None
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    tensors = {name: (t.data_ptr(), t.double().nan_to_num(7.0).sum().item()) for name, t in model.state_dict().items()}
    return tensors, model.config.to_dict(), hooks, model.training


# --- a wrong ratio ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1, -0.2, 1.5, 30, "0.3", None, float("nan"), True])
@pytest.mark.parametrize("config_class", [PruningConfig, RandomConfig, MagnitudeConfig, WandaConfig])
def test_a_wrong_ratio(config_class, ratio):
    with refused(ConfigError, "pruning_ratio", repr(ratio), "below 1"):
        config_class(ratio)


def test_nothing_but_a_vocabulary_goes_at_ratio_zero(model):
    with refused(ConfigError, "pruning_ratio", "0", "or a vocabulary", model=model):
        prune(model, PruningConfig(0))
    with refused(ConfigError, "pruning_ratio", "0", "above 0"):
        MagnitudeConfig(0)


def test_a_ratio_out_of_reach(model):
    with refused(BudgetError, "0.9 of decoder is out of reach", "let go at most 0.", "Ask for less", model=model):
        prune(model, RandomConfig(0.9, axes=("attention",)))


# --- nothing removed although asked -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (RandomConfig(0.0001), "smallest step removes"),
        (RandomConfig(0.01, budget="units", round_to=32), "nearest step is none at all"),
        (RandomConfig(0.3, axes=("mlp",), min_units=40), "leave no unit that may go"),
        (RandomConfig(0.3, protect=("layers.*",)), "leave no unit that may go"),
    ],
)
def test_removing_nothing_is_an_error(model, config, said):
    with refused(HFPruneError, said, "would remove nothing", "Ask for a larger ratio", model=model):
        prune(model, config)


# --- calibration ------------------------------------------------------------------------------------------------------


def test_calibration_missing_empty_or_too_short(model, tokenizer, text, tmp_path):
    config = WandaConfig(0.3, num_samples=4, seq_len=16)
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    short = write_text(tmp_path / "short.txt", 12)
    with refused(CalibrationError, "'wanda'", "calibration", "pass", model=model):
        prune(model, config)
    with refused(CalibrationError, "needs a tokenizer", "pass the model's own", model=model):
        prune(model, config, calibration=text)
    with refused(CalibrationError, "no text", "expected at least", "pass another source", model=model):
        prune(model, config, tokenizer=tokenizer, calibration=str(empty))
    with refused(CalibrationError, "tokens, but 4 windows of 16 need 64", "pass a longer text", model=model):
        prune(model, config, tokenizer=tokenizer, calibration=short)
    with refused(CalibrationError, "no file at", "check the path", model=model):
        prune(model, config, tokenizer=tokenizer, calibration=str(tmp_path / "nowhere.txt"))
    with refused(CalibrationError, "found none", "one or more", model=model):
        prune(model, config, calibration=[])
    with refused(CalibrationError, "found (3,)", "int64 [B, T]", model=model):
        prune(model, config, calibration=[{"input_ids": torch.arange(3)}])
    padded = {"input_ids": token_ids(), "attention_mask": torch.zeros(2, 9)}
    with refused(CalibrationError, "padding", "give windows of equal length", model=model):
        prune(model, config, calibration=[padded])


def test_calibration_without_a_pruning_config(tmp_path):
    with refused(ConfigError, "calibration was given without a pruning_config", "pass one"):
        PrunedModelForCausalLM.from_pretrained(tmp_path, calibration="text.txt")


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_names_its_axis(value):
    broken, structure = tiny_model("llama", dtype=torch.float32), shared_structure("llama")
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 7] = value
    with refused(ScoreError, "layers.1.mlp", "1 of 40 scores", "expected finite", "Look for", model=broken):
        hf_prune.scores.score(broken, structure, MagnitudeConfig(0.3))
    with refused(ScoreError, "NaN or infinite", model=broken):
        hf_prune.scores.score(broken, structure, WandaConfig(0.3), batches=[{"input_ids": token_ids()}])


def test_scores_of_the_caller_need_allocate(model):
    with refused(ConfigError, "'custom'", "scores nothing", "expected one of", model=model):
        prune(model, PruningConfig(0.3))
    structure = shared_structure("llama")
    config = PruningConfig(0.3, axes=("mlp",), layers=(0,))
    with refused(ScoreError, "layers.0.mlp", "no scores were given", "expected 40"):
        hf_prune.allocate({}, structure, config)
    with refused(ScoreError, "layers.0.mlp", "found scores of shape (39,)", "expected a tensor of shape (40,)"):
        hf_prune.allocate({"layers.0.mlp": torch.zeros(39)}, structure, config)


# --- what cannot be pruned --------------------------------------------------------------------------------------------


def test_an_architecture_or_op_that_cannot_be_pruned():
    from test_structure import CustomConfig, CustomModel

    for what, said in (("data-dependent", "cannot be traced"), ("no layers", "no list of decoder layers")):
        custom = CustomModel(CustomConfig(what=what))
        with refused(StructureError, said, "cannot be pruned", model=custom):
            prune(custom, RandomConfig(0.3, axes=("mlp",)))
    custom = CustomModel(CustomConfig(what="op without a rule"))
    with refused(StructureError, "'mlp'", "Ask for other axes", model=custom):
        prune(custom, RandomConfig(0.3, axes=("mlp",)))


def test_a_branch_that_is_not_one_module():
    opt = tiny_model("opt", dtype=torch.float32)
    with refused(StructureError, "'layer_mlp'", "not one module", "Ask for other axes", model=opt):
        prune(opt, RandomConfig(0.3, axes=("layer_mlp",)))


def test_layers_and_patterns_that_the_model_lacks(model):
    with refused(ConfigError, "layers: found 7", "expected 0 to 2", model=model):
        prune(model, RandomConfig(0.3, layers=(0, 7)))
    with refused(ConfigError, "protect: 'layer.0.*'", "matches none", "layers.0", model=model):
        prune(model, RandomConfig(0.3, protect=("layer.0.*",)))


# --- a plan for another model -----------------------------------------------------------------------------------------


def test_a_plan_for_another_model(model):
    plan = prune(model, MagnitudeConfig(0.3)).plan
    other = tiny_model("qwen3", dtype=torch.float32)
    with refused(PlanError, "'llama', found 'qwen3'", "made for", "make a new plan", model=other):
        apply_plan(other, shared_structure("qwen3"), plan)
    tied = tiny_model("llama_tied", dtype=torch.float32)
    with refused(PlanError, "layers.0.attention", "3 units but this model has 2", "make a new plan", model=tied):
        apply_plan(tied, shared_structure("llama_tied"), plan)
    with refused(PlanError, "found shape", "the structure has", model=tied):
        apply_plan(tied, shared_structure("llama"), plan)
    pruned = apply_plan(model, shared_structure("llama"), plan)
    with refused(PlanError, "make a new plan", model=pruned):
        apply_plan(pruned, hf_prune.infer_structure(pruned), plan)


def test_a_damaged_plan(tmp_path):
    path = tmp_path / "plan.json"
    make_plan(shared_structure("llama"), {"layers.0.mlp": (1, 2)}).save(path)
    path.write_text(path.read_text()[:-30])
    with refused(PlanError, "must be JSON", "damaged"):
        PruningPlan.load(path)
    with refused(PlanError, "no plan can be read from"):
        PruningPlan.load(tmp_path / "nowhere.json")


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(model, tmp_path):
    pruned = prune(model, RandomConfig(0.3, allocation="global")).model
    PrunedModelForCausalLM.save_pretrained(pruned, tmp_path / "pruned")
    return pruned, tmp_path / "pruned"


def _cut(path):
    path.write_bytes(path.read_bytes()[:-64])


def _drop_a_tensor(path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("config.json", _cut, "not readable JSON"),
        ("model.safetensors", _cut, "it was cut off"),
        ("model.safetensors", lambda path: path.unlink(), "holds neither"),
        ("model.safetensors", _drop_a_tensor, "up_proj.weight is missing"),
        ("pruning_plan.json", _cut, "not readable JSON"),
    ],
)
def test_a_damaged_checkpoint_is_named_before_it_is_loaded(checkpoint, name, damage, said):
    _, directory = checkpoint
    PrunedModelForCausalLM.from_pretrained(directory)
    damage(directory / name)
    with refused(CheckpointError, said, "again"):
        PrunedModelForCausalLM.from_pretrained(directory)


def test_a_disk_that_fills_while_saving_leaves_the_old_checkpoint(checkpoint, monkeypatch):
    pruned, directory = checkpoint
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    changed = PrunedModelForCausalLM.prune(tiny_model("llama", seed=1, dtype=torch.float32), RandomConfig(0.4))

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.modeling_utils.safe_save_file", full)
        said = ("No space left", "unchanged", "Check free space")
        with refused(CheckpointError, *said):  # transformers writes the architecture into the config, nothing else
            PrunedModelForCausalLM.save_pretrained(changed, directory)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
        with refused(CheckpointError, "saving needs", "1 are free", "Free disk space", model=changed):
            PrunedModelForCausalLM.save_pretrained(changed, directory)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert [path.name for path in directory.parent.iterdir()] == ["pruned"]
    assert torch.allclose(logits(PrunedModelForCausalLM.from_pretrained(directory)), logits(pruned), atol=1e-6)


def test_a_model_that_was_not_pruned_is_not_saved_as_one(model, tmp_path):
    with refused(CheckpointError, "no `pruning_config`", "model.save_pretrained()", model=model):
        PrunedModelForCausalLM.save_pretrained(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
