"""The output is never the input, nothing is replaced unasked, and of several processes one writes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from launching import launch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hf_prune import MagnitudeConfig, PrunedModelForCausalLM, last_checkpoint, prune, recover
from hf_prune.checkpoint.saving import install_save_hook, save_pruned
from hf_prune.cli.main import app
from hf_prune.errors import CheckpointError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("output")
    tiny.write_checkpoint(folder / "dense")
    tiny.write_text(folder / "text.txt", 1000, seed=1)
    result = prune(AutoModelForCausalLM.from_pretrained(folder / "dense"), MagnitudeConfig(0.3))
    save_pruned(result.model, folder / "pruned", tokenizer=AutoTokenizer.from_pretrained(folder / "dense"))
    return folder


@pytest.fixture
def material(made, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(made, tmp_path / "material"))
    (folder / "link").symlink_to("dense")
    (folder / "dense" / "merges.txt").write_text("words")  # a text with the name of a tokenizer's file
    monkeypatch.chdir(folder)
    return folder


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(words, said):
    result = CliRunner(env={"COLUMNS": "500"}).invoke(app, [str(word) for word in words])
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    return result


PRUNE = ["--method", "magnitude", "--pruning-ratio", 0.3]
TRAIN = ["--train", "text.txt", "--steps", 2, "--seq-len", 16, "--use-cpu"]
ROWS = ["--methods", "magnitude", "--ratios", 0.3, "--text", "text.txt"]


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["prune", "dense", "dense", *PRUNE], "model"),
        (["prune", "dense", "link", *PRUNE], "model"),
        (["prune", "link", "./pruned/../dense", *PRUNE], "model"),
        (["prune", "dense", Path.cwd, *PRUNE], "model"),
        (["prune", "dense", "out", *PRUNE, "--work-dir", "out"], "work_dir"),
        (["prune", "dense", "out", *PRUNE, "--work-dir", "out/work"], "work_dir"),
        (["prune", "dense", "pruned", *PRUNE, "--calibration", "pruned/config.json"], "calibration"),
        (["prune", "pruned", "dense", *PRUNE, "--calibration", "link/merges.txt"], "calibration"),
        (["prune", "dense", "out", "--method", "prunenet", "--pruning-ratio", 0.3, "--set", "save_policy=out"], "save"),
        (["recover", "pruned", "pruned", *TRAIN], "model"),
        (["recover", "pruned", "dense", *TRAIN, "--teacher", "link"], "teacher"),
        (["recover", "pruned-training/checkpoint-1", "pruned", *TRAIN, "--resume"], "model"),
        (["sweep", "dense", "link", *ROWS], "model"),
        (["quantise", "pruned", "pruned"], "model"),
        (["quantise", "pruned", "./link/../pruned", "--text", "text.txt"], "model"),
        (["quantise", "pruned", "dense", "--text", "link/merges.txt"], "text"),
    ],
    ids=str,
)
def test_the_output_is_no_input(material, monkeypatch, words, name, overwrite):
    for module in ("hf_prune.loading", "hf_prune.pipeline", "hf_prune.recovery.recover"):
        for function in ("load_model", "open_model", "load_tokenizer"):
            monkeypatch.setattr(f"{module}.{function}", None, raising=False)  # refused before anything is loaded
    shutil.copytree("pruned", "pruned-training/checkpoint-1")
    before = contents(material)
    words = [material / "pruned" / ".." / "dense" if word == Path.cwd else word for word in words]
    words += ["--overwrite"] if overwrite and words[0] != "sweep" else []
    refused(words, f"would replace what is read: {name}")
    assert contents(material) == before
    assert not (material / "out").exists()


def test_the_same_place_under_another_name(material, monkeypatch):
    """Where paths differ and the directory is one: bind mounts, file systems without capital letters."""
    monkeypatch.setattr(os.path, "samefile", lambda *two: {Path(one).name for one in two} == {"pruned", "dense"})
    refused(["prune", "dense", "pruned", *PRUNE, "--overwrite"], "would replace what is read: model")


def test_nothing_is_replaced_unasked(material, monkeypatch):
    before = contents(material / "pruned")
    with monkeypatch.context() as patched:
        for module in ("hf_prune.loading", "hf_prune.pipeline", "hf_prune.recovery.recover"):
            patched.setattr(f"{module}.load_model", None, raising=False)
        refused(["prune", "dense", "pruned", *PRUNE], "holds a checkpoint already")
        refused(["recover", "dense", "pruned", *TRAIN], "holds a checkpoint already")
        refused(["sweep", "dense", "pruned", *ROWS], "is not empty and holds no sweep")
        refused(["quantise", "pruned", "dense"], "holds a checkpoint already")
        with pytest.raises(CheckpointError, match="overwrite=True"):
            recover("dense", "pruned", train="text.txt")
    assert contents(material / "pruned") == before
    (material / "thesis").mkdir()
    (material / "thesis" / "thesis.tex").touch()
    refused(["prune", "dense", "thesis", *PRUNE, "--overwrite"], "thesis.tex")
    words = ["prune", "dense", "pruned", "--method", "magnitude", "--pruning-ratio", 0.5, "--overwrite"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    assert contents(material / "pruned") != before
    assert "pruned" in {path.name for path in material.iterdir() if not path.name.startswith(".")}
    assert not [path for path in material.iterdir() if path.name.startswith(".")]


def test_saving_replaces_checkpoints_but_not_the_source(material):
    """As `save_pretrained` does; what the model was pruned from could not be brought back."""
    install_save_hook()
    before = contents(material / "dense")
    dense = AutoModelForCausalLM.from_pretrained(material / "dense")
    model = prune(dense, MagnitudeConfig(0.3)).model
    for save in (save_pruned, PrunedModelForCausalLM.save_pretrained, type(model).save_pretrained):
        for place in ("dense", "link", material / "dense"):
            with pytest.raises(CheckpointError, match="was pruned from"):
                save(model, place)
    assert contents(material / "dense") == before
    save_pruned(model, "mine")
    loaded = AutoModelForCausalLM.from_pretrained("mine")
    with pytest.raises(CheckpointError, match="was pruned from"):  # also of one that is loaded again
        save_pruned(loaded, "dense")
    with torch.no_grad():
        loaded.lm_head.weight.add_(1.0)
    for save in (save_pruned, type(model).save_pretrained):
        save(loaded, "mine")  # a later state of the same model
        again = AutoModelForCausalLM.from_pretrained("mine")
        assert torch.equal(again.lm_head.weight, loaded.lm_head.weight)
    twice = prune(loaded, MagnitudeConfig(0.2)).model
    with pytest.raises(CheckpointError, match="was pruned from"):
        save_pruned(twice, "mine")
    from_disk = prune("mine", MagnitudeConfig(0.2), layers_on="disk")
    save_pruned(from_disk.model, "twice")
    from hf_prune.loading import open_model

    opened = open_model("twice", layers_on="disk")
    with pytest.raises(CheckpointError, match="is read from"):
        save_pruned(opened, "twice")
    save_pruned(opened, "elsewhere")


# --- checkpoints of a run that was stopped ----------------------------------------------------------------------------

DAMAGES = {
    "no state": lambda folder: (folder / "trainer_state.json").unlink(),
    "half of the state": lambda folder: cut(folder / "trainer_state.json"),
    "half of the weights": lambda folder: cut(folder / "model.safetensors"),
    "half of the optimizer": lambda folder: cut(folder / "optimizer.pt"),
}


SLOW_DAMAGES = [name for name in DAMAGES if name.startswith("half of the") and name != "half of the weights"]


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage", ["no state", "half of the weights", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW_DAMAGES)]
)
def test_recovery_goes_on_from_the_newest_whole_checkpoint(material, damage, monkeypatch):
    options = {"train": "text.txt", "preset": "full", "seq_len": 16, "steps": 3, "save_steps": 1, "use_cpu": True}
    options |= {"per_device_train_batch_size": 4, "save_total_limit": 3, "disable_tqdm": True, "learning_rate": 1e-2}
    monkeypatch.setattr("hf_prune.recovery.recover.remove_checkpoints", lambda _: None)
    whole = recover("pruned", "whole", **options)
    shutil.copytree("whole-training", "out-training")
    folder = material / "out-training"
    for step in (3, 2):
        DAMAGES[damage](folder / f"checkpoint-{step}")
    (folder / "checkpoint-2" / ".tmpAbCdEf").write_text("what a killed writer of safetensors leaves")
    assert last_checkpoint(folder) == str(folder / "checkpoint-1")
    found = recover("pruned", "out", resume=True, **options)
    assert [entry["step"] for entry in found.log_history if "loss" in entry] == [1, 2, 3]
    assert (material / "out" / "model.safetensors").read_bytes() == (
        material / "whole" / "model.safetensors"
    ).read_bytes()
    assert last_checkpoint(folder) == str(folder / "checkpoint-3")
    assert not list(folder.rglob(".tmp*"))
    for checkpoint in folder.glob("checkpoint-*"):
        DAMAGES[damage](checkpoint)
    shutil.rmtree("out")
    again = recover("pruned", "out", resume=True, **options)  # from the start
    assert torch.equal(again.model.lm_head.weight, whole.model.lm_head.weight)


# --- several processes ------------------------------------------------------------------------------------------------

WORKER = """
import sys
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer
from hf_prune.checkpoint.saving import save_pruned, verify_checkpoint
from hf_prune.errors import CheckpointError
from hf_prune.cli.sweep import sweep
import hf_prune, os, time
state = PartialState(cpu=True)
os.chdir(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained("pruned")
slow = hf_prune.checkpoint.saving.write_card
def write_card(*args, **kwargs):
    time.sleep(0.5)
    print("wrote")
    slow(*args, **kwargs)
hf_prune.checkpoint.saving.write_card = write_card
for _ in range(2):
    save_pruned(model, "together")
    verify_checkpoint("together")
    state.wait_for_everyone()
model.save_pretrained("plain")
verify_checkpoint("plain")
if state.is_main_process:
    save_pruned(model, "alone")
try:
    save_pruned(model, "foreign")
except CheckpointError as error:
    print("refused", "thesis.tex" in str(error))
state.wait_for_everyone()
made = []
def watch(event, args):
    if event == "os.mkdir" and os.path.basename(args[0]).startswith("."):  # a file of hf_prune is written
        made.append(os.path.basename(args[0]).partition(".new-")[0][1:])
sys.addaudithook(watch)
dense, tokenizer = AutoModelForCausalLM.from_pretrained("dense"), AutoTokenizer.from_pretrained("dense")
settings = {"num_samples": 4, "seq_len": 16, "num_episodes": 1, "save_policy": "policy", "budget": "latency"}
texts = {"text": "text.txt", "calibration": "text.txt", "window": 32}
rows = sweep(dense, tokenizer, "rows", methods=["prunenet", "wanda"], ratios=[0.3], settings=settings, **texts)
print("made", *sorted(set(made)))
print("rows", rows)
state.destroy_process_group()
"""


def test_of_two_processes_the_main_one_writes(material):
    (material / "foreign").mkdir()
    (material / "foreign" / "thesis.tex").touch()
    printed = launch(WORKER, material)
    said = [line for text in printed for line in text.splitlines()]
    assert said.count("wrote") == 2 + 1
    assert said.count("refused True") == 2
    made, mine = sorted((line.split()[1:] for line in said if line.startswith("made")), key=len, reverse=True)
    assert mine == []
    assert {"results.json", "results.md", "latency.json", "policy.safetensors"} < set(made)
    first, second = (line for line in said if line.startswith("rows"))
    assert first == second
    whole = AutoModelForCausalLM.from_pretrained("pruned")
    for place in ("together", "plain", "alone"):
        found = AutoModelForCausalLM.from_pretrained(place)
        assert all(torch.equal(values, found.state_dict()[name]) for name, values in whole.state_dict().items())
    assert not [path for path in material.iterdir() if path.name.startswith(".")]
