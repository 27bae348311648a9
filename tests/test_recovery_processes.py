"""Two processes under DDP and FSDP2: one small model comes out, the same as on one process to rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
import yaml
from launching import launch
from models import tiny_model
from test_recovery_callback import make_callback, trainer_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_prune import MagnitudeConfig, PrunedModelForCausalLM, prune, recover

WORKER = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from models import tiny_model
from test_recovery_callback import make_callback, trainer_of
from hf_prune.cli.main import app
from hf_prune.errors import ConfigError
found = {}
for mode in ("start", "gradual", "cut"):
    model = tiny_model("llama", dtype=torch.float32)
    callback = make_callback(mode)
    directory = f"{sys.argv[1]}/{mode}"
    try:
        trainer = trainer_of(model, directory, callback, per_device_train_batch_size=2)
    except ConfigError as error:
        found[mode] = str(error)
        continue
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    trainer.save_model(f"{directory}/saved")
    loss = trainer.evaluate(trainer.train_dataset[:8])["eval_loss"]
    found[mode] = {"state": model.state_dict(), "plan": callback.plan.to_json(), "loss": loss}
torch.save(found, f"{sys.argv[1]}/{trainer.accelerator.process_index}.pt")
command = sys.argv[3:]
app(command, standalone_mode=False)

# FSDP2, as `accelerate launch --config_file docs/fsdp2.yaml` starts it: accelerate reads its file into the environment.
# Of CPUs it would make DDP, so these processes are taken for GPUs.
import os, shutil
from pathlib import Path
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
begin = PartialState.__init__
def as_if_on_gpus(state, *args, **kwargs):
    begin(state, *args, **kwargs)
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU
PartialState.__init__ = as_if_on_gpus
os.environ |= environment
AcceleratorState._reset_state(reset_partial_state=True)
sharded = Path(sys.argv[1]) / "sharded"
command[2] = str(sharded)
command += ["--hidden-weight", "0", "--alpha", "0.5", "--teacher-cache", f"{sys.argv[1]}/taught", "--save-steps", "2"]
command += ["--optim", "adamw_torch", "--learning-rate", "1e-2"]
import hf_prune.recovery.recover as recovery
removed, recovery.remove_checkpoints = recovery.remove_checkpoints, lambda _: None
app(command, standalone_mode=False)
recovery.remove_checkpoints = removed
torch.save(AcceleratorState().is_fsdp2, f"{sys.argv[1]}/fsdp2-{os.environ['RANK']}.pt")
torch.distributed.barrier()
if os.environ["RANK"] == "0":  # as if the run had been killed after its first checkpoint
    sharded.rename(f"{sharded}-whole")
    shutil.rmtree(f"{sharded}-training/checkpoint-4")
torch.distributed.barrier()
AcceleratorState._reset_state(reset_partial_state=True)
app([*command, "--resume"], standalone_mode=False)
torch.distributed.destroy_process_group()
"""
ZERO3 = """
# DeepSpeed ZeRO-3, as `accelerate launch --config_file docs/zero3.yaml` starts it; these processes are taken for GPUs.
import os, shutil, sys, torch
from pathlib import Path
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
PartialState._prepare_backend = lambda state, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = lambda state: setattr(state, "device", torch.device("cpu"))
os.environ |= environment
from hf_prune.cli.main import app
import hf_prune.recovery.recover as recovery
def run(name, *more):
    command = ["recover", f"{folder}/pruned", f"{folder}/zero3-{name}", *sys.argv[2:], *RECIPES[name], *more]
    app(command, standalone_mode=False)
    assert AcceleratorState().distributed_type == DistributedType.DEEPSPEED and AcceleratorState().num_processes == 2
    torch.distributed.barrier()
    AcceleratorState._reset_state(reset_partial_state=True)
folder = sys.argv[1]
for name in RECIPES:
    if name == "distill":
        removed, recovery.remove_checkpoints = recovery.remove_checkpoints, lambda _: None
        run(name)
        recovery.remove_checkpoints = removed
        if os.environ["RANK"] == "0":  # as if the run had been killed after its first checkpoint
            Path(f"{folder}/zero3-distill").rename(f"{folder}/zero3-whole")
            shutil.rmtree(f"{folder}/zero3-distill-training/checkpoint-4")
        torch.distributed.barrier()
        run(name, "--resume")
    else:
        run(name)

# A model that transformers splits while it loads it is the same, in pieces.
import deepspeed
from transformers import AutoModelForCausalLM, TrainingArguments
from hf_prune.loading import load_model
args = TrainingArguments(f"{folder}/split")
whole = dict(load_model(f"{folder}/pruned").named_parameters())
split = dict(AutoModelForCausalLM.from_pretrained(f"{folder}/pruned").named_parameters())
assert whole.keys() == split.keys() and all(part.numel() == 0 for part in split.values())
with deepspeed.zero.GatheredParameters(list(split.values())):
    assert all(torch.equal(whole[name], part) for name, part in split.items())
torch.distributed.destroy_process_group()
"""
OPTIONS = {"steps": 4, "seq_len": 16, "hidden_weight": 1.0}
OPTIONS |= {"learning_rate": 0.5, "optim": "sgd", "load_best_model_at_end": False}


def accelerate_environment():
    """What `accelerate launch` makes of the file that the documents ship."""
    config = yaml.safe_load((Path(__file__).parents[1] / "docs" / "fsdp2.yaml").read_text())
    assert config["distributed_type"] == "FSDP"
    found = {name.upper(): str(value) for name, value in config["fsdp_config"].items()}
    return {"ACCELERATE_USE_FSDP": "true", **found}


def zero3_environment():
    """The same of the other file, but for the precision, which a CPU refuses."""
    config = yaml.safe_load((Path(__file__).parents[1] / "docs" / "zero3.yaml").read_text())
    assert config["distributed_type"] == "DEEPSPEED"
    found = {
        name.upper().removesuffix("_FLAG"): str(value).lower() for name, value in config["deepspeed_config"].items()
    }
    found = {f"ACCELERATE_DEEPSPEED_{name}": value for name, value in found.items()}
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "false", "DS_ACCELERATOR": "cpu", **found}


def write_models(folder):
    """A dense model, a pruned one, and texts."""
    tiny.write_checkpoint(folder / "dense")
    tiny.write_text(folder / "train.txt", 2000, seed=1)
    tiny.write_text(folder / "eval.txt", 300, seed=2)
    tokenizer = AutoTokenizer.from_pretrained(folder / "dense")
    result = prune(AutoModelForCausalLM.from_pretrained(folder / "dense"), MagnitudeConfig(0.3, allocation="global"))
    PrunedModelForCausalLM.save_pretrained(result.model, folder / "pruned", plan=result.plan, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What two processes made: a folder, the results of each, and what each printed."""
    folder = tmp_path_factory.mktemp("processes")
    write_models(folder)
    command = ["recover", folder / "pruned", folder / "out", "--train", folder / "train.txt", "--preset", "full"]
    command += ["--eval", folder / "eval.txt", "--teacher", folder / "dense", "--per-device-train-batch-size", 2]
    command += [word for name, value in OPTIONS.items() for word in (f"--{name.replace('_', '-')}", value)]
    environment = f"environment = {accelerate_environment()}\n"
    printed = launch(environment + WORKER, folder, Path(__file__).parent, *command)
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(2)], printed


@pytest.mark.parametrize("mode", ["start", "gradual"])
def test_pruning_in_a_run_of_two_processes(together, tmp_path, mode):
    folder, (first, second), _ = together
    assert first[mode]["plan"] == second[mode]["plan"]
    assert first[mode]["loss"] == second[mode]["loss"]
    for name, tensor in first[mode]["state"].items():
        assert torch.equal(tensor, second[mode]["state"][name])
    saved = AutoModelForCausalLM.from_pretrained(folder / mode / "saved")
    assert all(torch.equal(tensor, first[mode]["state"][name]) for name, tensor in saved.state_dict().items())
    model, callback = tiny_model("llama", dtype=torch.float32), make_callback(mode)
    trainer_of(model, tmp_path, callback).train()
    assert callback.plan.to_json() == first[mode]["plan"]
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, first[mode]["state"][name], rtol=1e-2, atol=1e-3)


def test_cutting_in_the_middle_is_refused(together):
    for found in together[1]:
        assert "mode 'cut' cannot work under DDP" in found["cut"]


def test_recovery_on_two_processes_saves_one_model(together, tmp_path):
    folder, _, printed = together
    assert [stdout.count("perplexity after") for stdout in printed] == [3, 0]
    texts = {"train": folder / "train.txt", "eval": folder / "eval.txt", "teacher": folder / "dense"}
    options = {**OPTIONS, "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True}
    alone = recover(folder / "pruned", tmp_path / "alone", preset="full", **texts, **options)
    found = AutoModelForCausalLM.from_pretrained(folder / "out").state_dict()
    for name, tensor in alone.model.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-2, atol=1e-3)


def test_recovery_under_fsdp2_is_that_of_one_process_and_resumes(together, tmp_path):
    folder = together[0]
    assert torch.load(folder / "fsdp2-0.pt")
    texts = {"train": folder / "train.txt", "eval": folder / "eval.txt", "teacher": folder / "dense"}
    options = {**OPTIONS, "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True}
    options |= {"hidden_weight": 0.0, "alpha": 0.5, "teacher_cache": folder / "taught", "preset": "full"}
    options |= {"optim": "adamw_torch", "learning_rate": 1e-2, "save_steps": 2}
    alone = recover(folder / "pruned", tmp_path / "alone", **texts, **options).model.state_dict()
    start = AutoModelForCausalLM.from_pretrained(folder / "pruned").state_dict()
    whole = AutoModelForCausalLM.from_pretrained(folder / "sharded-whole").state_dict()
    resumed = AutoModelForCausalLM.from_pretrained(folder / "sharded").state_dict()
    assert max(float((start[name] - tensor).abs().max()) for name, tensor in whole.items()) > 1e-3
    for name, tensor in alone.items():
        torch.testing.assert_close(whole[name], tensor, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(resumed[name], whole[name], rtol=0, atol=0)


def test_recovery_under_zero3_is_that_of_one_process_and_resumes(tmp_path):
    pytest.importorskip("deepspeed", reason="pip install deepspeed; a first run compiles for a minute")
    write_models(tmp_path)
    texts = {"train": tmp_path / "train.txt", "eval": tmp_path / "eval.txt"}
    recipes = {
        "distill": {"teacher": tmp_path / "dense", "hidden_weight": 1.0},
        "full": {"teacher": tmp_path / "dense", "alpha": 0.5, "teacher_cache": tmp_path / "taught"},
        "lora": {},
        "norms": {},
    }
    options = {"steps": 4, "seq_len": 16, "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-2}

    def words(settings):
        return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]

    asked = {name: ["--preset", name, *words(settings)] for name, settings in recipes.items()}
    code = f"environment = {zero3_environment()}\nRECIPES = {asked}\n" + ZERO3
    printed = launch(code, tmp_path, *words({**texts, **options, "per_device_train_batch_size": 2}))
    assert [stdout.count("perplexity after") for stdout in printed] == [5, 0]
    assert "'prune/params': 15008" in printed[0] + (tmp_path / "0.err").read_text()

    def weights(name):
        return AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()

    start = weights("pruned")
    for name, settings in recipes.items():
        alone = {
            **texts,
            **settings,
            **options,
            "per_device_train_batch_size": 4,
            "use_cpu": True,
            "disable_tqdm": True,
        }
        expected = recover(tmp_path / "pruned", tmp_path / name, preset=name, **alone).model.state_dict()
        found = weights(f"zero3-{name}")
        assert max(float((start[key] - tensor).abs().max()) for key, tensor in found.items()) > 1e-3
        for key, tensor in expected.items():
            if name == "lora":  # each process has a dropout of its own
                assert float((found[key] - tensor).norm()) <= 0.8 * float((start[key] - tensor).norm())
            else:
                torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=1e-4)
    for key, tensor in weights("zero3-whole").items():
        torch.testing.assert_close(weights("zero3-distill")[key], tensor, rtol=0, atol=0)
