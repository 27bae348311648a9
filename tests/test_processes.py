"""Layers and windows shared out: several processes, or layers in several places, prune as one process does."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from accelerate import PartialState, dispatch_model
from launching import launch
from models import tiny_model, token_ids
from tiny import write_checkpoint, write_text
from transformers import AutoModelForCausalLM

from hf_prune import LLMPrunerConfig, MagnitudeConfig, OBSConfig, PolicyGradientConfig, WandaConfig, prune
from hf_prune.layers.weights import is_on_disk, read_weight
from hf_prune.layers.work import WorkDir
from hf_prune.scores.policy_gradient.state import StateFile

LEARN = {"policy_steps": 4, "num_masks": 2, "init_samples": 3, "state_steps": 1}
SEARCH = {"allocation": "search", "search_evaluations": 6, "search_samples": 4, "repair": "least_squares"}
CONFIGS = {
    "wanda": WandaConfig(0.3, allocation="spectral"),
    "wanda, hidden": WandaConfig(0.3, axes=("hidden",), budget="model"),
    "fisher, selection, repair": LLMPrunerConfig(0.3, selection="obs", repair="least_squares"),
    "fisher, hidden and branches": LLMPrunerConfig(0.3, axes=("hidden", "layer_mlp"), budget="model"),
    "first order, in steps, repair": LLMPrunerConfig(
        0.3, criterion="first_order", num_steps=2, repair="least_squares", repair_target="asymmetric"
    ),
    "second order, end to end": LLMPrunerConfig(0.3, criterion="second_order", repair="end_to_end"),
    "vector": LLMPrunerConfig(0.3, criterion="vector"),
    "mixed": LLMPrunerConfig(0.3, criterion="mixed"),
    "obs, repair": OBSConfig(0.3, repair="least_squares", repair_target="own"),
    "policy gradient": PolicyGradientConfig(0.3, **LEARN, windows_per_step=2),
    "policy gradient, one window at a time": PolicyGradientConfig(0.3, **LEARN, windows_per_step=1, init="magnitude"),
    "search with repair": MagnitudeConfig(0.3, **SEARCH),
    "repair without data": MagnitudeConfig(0.3, repair="data_free"),
}
EXPERTS = ("wanda", "fisher, selection, repair", "vector", "obs, repair", "repair without data")
ON_DISK = ("fisher, selection, repair", "first order, in steps, repair", "obs, repair", "search with repair")
CASES = {
    (family, name, num_windows, where)
    for family in ("llama", "mixtral")
    for name in CONFIGS
    for num_windows in (2, 5)
    for where in ("memory", "disk")
    if (
        (name in ON_DISK if where == "disk" else num_windows == 5 and name != "repair without data")
        if family == "llama"
        else where == "memory" and name in EXPERTS
    )
    and num_windows == (5 if where == "memory" and family == "llama" else 2)
} | {("llama", "second order, end to end", 5, "disk")}
"""Batches hold two windows: one batch, so that a process has none, and three batches, the last of one window."""
WORKER = """
import sys
sys.path.insert(0, sys.argv[2])
from test_processes import in_this_process
in_this_process(sys.argv[1], sys.argv[3:])
"""


def calibration(num_windows):
    return [{"input_ids": part} for part in token_ids(num_windows, 12).split(2)]


def found_by(folder, family, name, num_windows, where, **options):
    """What `prune` makes of a model: plan, scores and weights."""
    source = Path(folder) / family if where == "disk" else tiny_model(family)
    options |= {"layers_on": "disk", "dtype": "float32"} if where == "disk" else {}
    result = prune(source, CONFIGS[name], calibration=calibration(num_windows), **options)
    return {"plan": result.plan.to_json(), "scores": dict(result.scores), "weights": weights(result.model)}


def weights(model):
    return {name: read_weight(model, name).clone() for name, _ in model.named_parameters()}


class Interrupted(Exception):  # noqa: N818
    pass


def interrupted(folder, work, case, monkeypatch):
    """Run again and again, until it is through, stopped each time between what two processes write."""
    state, whole_step, whole_state = PartialState(), WorkDir.save_step, StateFile.save
    stops, left = 0, 0

    def save_step(self, name, step, tensors, note=None):
        nonlocal left
        left -= 1
        if left == 0:
            if state.process_index == stops % 2:  # the faster one
                self.save(f"{name}-{step:05}", tensors, note)
            raise Interrupted
        whole_step(self, name, step, tensors, note)

    def save_state(self, learned):
        nonlocal left
        left -= 1
        whole_state(self, learned)
        if left == 0:
            raise Interrupted

    monkeypatch.setattr(WorkDir, "save_step", save_step)
    monkeypatch.setattr(StateFile, "save", save_state)
    while True:
        left = 3
        try:
            return found_by(folder, *case, work_dir=work) | {"stops": stops}
        except Interrupted:
            stops += 1
            assert stops < 20


RESUMED = [
    ("llama", "fisher, selection, repair", 5, "memory"),
    ("llama", "obs, repair", 2, "disk"),
    ("mixtral", "obs, repair", 5, "disk"),
    ("llama", "repair without data", 2, "disk"),
    ("llama", "second order, end to end", 5, "disk"),
    ("llama", "policy gradient", 5, "memory"),
    ("llama", "search with repair", 2, "disk"),
]


def in_this_process(folder, command):
    """All cases in one of several processes."""
    from hf_prune.cli.main import app

    state = PartialState(cpu=True)
    assert state.num_processes == 2
    found = {case: found_by(folder, *case) for case in sorted(CASES)}
    for number, case in enumerate(RESUMED):
        work = Path(folder) / f"work {number}"
        with pytest.MonkeyPatch.context() as patch:
            found[("interrupted", *case)] = interrupted(folder, work, case, patch)
        if state.process_index == 1:  # this one had not come so far
            for own in work.rglob("*-1-of-2"):
                shutil.rmtree(own, ignore_errors=True)
        found[("behind", *case)] = found_by(folder, *case, work_dir=work)
    torch.save(found, f"{folder}/{state.process_index}.pt")
    app(command, standalone_mode=False)
    state.destroy_process_group()


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """A folder, what each of two processes found, and what they printed."""
    folder = tmp_path_factory.mktemp("processes")
    for family in ("llama", "mixtral"):
        tiny_model(family).save_pretrained(folder / family)
    write_checkpoint(folder / "dense")
    write_text(folder / "text.txt", 400, seed=1)
    command = ["prune", folder / "dense", folder / "out", "--method", "obs", "--pruning-ratio", "0.3"]
    command += ["--calibration", folder / "text.txt", "--num-samples", "3", "--seq-len", "16", "--batch-size", "1"]
    command += ["--layers-on", "disk", "--work-dir", folder / "work"]
    printed = launch(WORKER, folder, Path(__file__).parent, *command)
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(2)], printed


@pytest.fixture(scope="module")
def alone(together):
    """What one process finds, each case once."""
    known = {}

    def find(case):
        if case not in known:
            known[case] = found_by(together[0], *case)
        return known[case]

    return find


def same_bits(left, right):
    return left.keys() == right.keys() and all(torch.equal(values, right[name]) for name, values in left.items())


def check(found, other, wanted):
    assert found["plan"] == other["plan"] == wanted["plan"]
    for kind in ("scores", "weights"):
        assert same_bits(found[kind], other[kind])
        for name, values in wanted[kind].items():
            # fewer tokens than inputs: with a small ridge a refit multiplies the rounding of float32 sums
            atol = 1e-9 if kind == "scores" else 1e-5 if values.dtype == torch.float64 else 1e-4
            torch.testing.assert_close(found[kind][name], values, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("case", sorted(CASES), ids=str)
def test_two_processes_prune_as_one(together, alone, case):
    check(*(found[case] for found in together[1]), alone(case))


@pytest.mark.parametrize("case", RESUMED, ids=str)
@pytest.mark.parametrize("how", ["interrupted", "behind"])
def test_two_processes_resume(together, alone, how, case):
    first, second = (found[(how, *case)] for found in together[1])
    assert how == "behind" or first["stops"]
    check(first, second, alone(case))


def test_the_command_line_of_two_processes_saves_once(together):
    folder, _, printed = together
    assert [str(folder / "out") in text.replace("\n", "") for text in printed] == [True, False]
    config = OBSConfig(0.3, num_samples=3, seq_len=16)
    wanted = prune(folder / "dense", config, calibration=str(folder / "text.txt"), batch_size=1)
    assert same_bits(weights(AutoModelForCausalLM.from_pretrained(folder / "out")), weights(wanted.model))


@pytest.mark.parametrize("name", [*ON_DISK, "wanda, hidden", "vector", "policy gradient"])
def test_layers_in_several_places(tmp_path, alone, name):
    """accelerate's `device_map`, dispatched here: one layer in memory, the others on disk."""
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    places = dict.fromkeys([*names, "model.layers.1"], "cpu") | {"model.layers.0": "disk", "model.layers.2": "disk"}
    model = dispatch_model(tiny_model("llama"), places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert is_on_disk(model)
    found, wanted = prune(model, CONFIGS[name], calibration=calibration(5)), alone(("llama", name, 5, "memory"))
    assert found.plan.to_json() == wanted["plan"]
    assert all(torch.equal(values, wanted["scores"][axis]) for axis, values in found.scores.items())
    own = weights(found.model)
    for key, values in wanted["weights"].items():
        torch.testing.assert_close(own[key], values)
