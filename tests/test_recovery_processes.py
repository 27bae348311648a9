"""Two processes under DDP: one small model comes out, the same as on one process to rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
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
from hf_prune.cli import app
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
app(sys.argv[3:], standalone_mode=False)
torch.distributed.destroy_process_group()
"""
OPTIONS = {"steps": 4, "seq_len": 16, "hidden_weight": 1.0}
OPTIONS |= {"learning_rate": 0.5, "optim": "sgd", "load_best_model_at_end": False}


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What two processes made: a folder, the results of each, and what each printed."""
    folder = tmp_path_factory.mktemp("processes")
    tiny.write_checkpoint(folder / "dense")
    tiny.write_text(folder / "train.txt", 2000, seed=1)
    tiny.write_text(folder / "eval.txt", 300, seed=2)
    tokenizer = AutoTokenizer.from_pretrained(folder / "dense")
    result = prune(AutoModelForCausalLM.from_pretrained(folder / "dense"), MagnitudeConfig(0.3, allocation="global"))
    PrunedModelForCausalLM.save_pretrained(result.model, folder / "pruned", plan=result.plan, tokenizer=tokenizer)
    command = ["recover", folder / "pruned", folder / "out", "--train", folder / "train.txt", "--full"]
    command += ["--eval", folder / "eval.txt", "--teacher", folder / "dense", "--per-device-train-batch-size", 2]
    command += [word for name, value in OPTIONS.items() for word in (f"--{name.replace('_', '-')}", value)]
    printed = launch(WORKER, folder, Path(__file__).parent, *command)
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(2)], printed


@pytest.mark.slow
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


@pytest.mark.slow
def test_cutting_in_the_middle_is_refused(together):
    for found in together[1]:
        assert "mode 'cut' cannot work under DDP" in found["cut"]


@pytest.mark.slow
def test_recovery_on_two_processes_saves_one_model(together, tmp_path):
    folder, _, printed = together
    assert ["perplexity after" in stdout for stdout in printed] == [True, False]
    texts = {"train": folder / "train.txt", "eval": folder / "eval.txt", "teacher": folder / "dense"}
    options = {**OPTIONS, "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True}
    alone = recover(folder / "pruned", tmp_path / "alone", lora=False, **texts, **options)
    found = AutoModelForCausalLM.from_pretrained(folder / "out").state_dict()
    for name, tensor in alone.model.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-2, atol=1e-3)
