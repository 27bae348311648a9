"""Learning on models as they come (offloaded, bfloat16), without waiting for the device, and the picture it leaves."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from accelerate import dispatch_model
from models import shared_model, shared_structure, tiny_model, token_ids
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, masking_utils

from hf_prune.checkpoint import saving
from hf_prune.checkpoint.files import CURVE_NAME
from hf_prune.checkpoint.saving import save_pruned
from hf_prune.config import MagnitudeConfig, PolicyGradientConfig
from hf_prune.layers.walk import Walk
from hf_prune.pipeline import prune
from hf_prune.scores import LearnedScores, check_scores, score
from hf_prune.scores.policy_gradient import learn_policy, training
from hf_prune.scores.policy_gradient.forward import MaskedModel, open_model
from hf_prune.scores.policy_gradient.policy import find_units
from hf_prune.structure.inference import infer_structure

QUICK = {"policy_steps": 4, "num_masks": 2, "windows_per_step": 4, "init": "magnitude", "policy": "widths_then_units"}


def samples(num_samples=8, length=9):
    return [{"input_ids": part} for part in token_ids(num_samples, length, 0).split(5)]


def learn(model, structure, config):
    units = find_units(structure, config, torch.device("cpu"))
    generator = torch.Generator().manual_seed(7)
    scores = {axis.name: torch.rand(axis.num_units, generator=generator) for axis in units.axes}
    return learn_policy(
        Walk(model, structure.layer_paths, samples()), structure, config, scores, torch.Generator().manual_seed(0)
    )


# --- models as they come ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [("mlp", "attention"), ("mlp", "attention", "layer_mlp")])
def test_offloaded_weights_give_the_same_probabilities(tmp_path, axes):
    plain = tiny_model("llama")
    structure = infer_structure(plain)
    names = [*(f"model.layers.{layer}" for layer in range(3)), "model.embed_tokens", "model.norm", "lm_head"]
    places = {name: "disk" if name in names[1:3] else "cpu" for name in [*names, "model.rotary_emb"]}
    model = dispatch_model(tiny_model("llama"), places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert [name for name, p in model.named_parameters() if p.is_meta]
    config = PolicyGradientConfig(0.4, axes=axes, **QUICK)
    expected, found = learn(plain, structure, config), learn(model, structure, config)
    assert torch.equal(found.keep_probs, expected.keep_probs)
    assert found.history == expected.history


def test_a_bfloat16_model_from_scores_to_the_checkpoint(tmp_path):
    model = tiny_model("llama", dtype=torch.bfloat16)
    config = PolicyGradientConfig(0.4, **QUICK | {"init": "wanda"})
    result = prune(model, config, calibration=samples())
    assert result.model.dtype == torch.bfloat16
    assert result.plan.achieved["decoder"] == pytest.approx(0.4, abs=0.08)
    assert all(values.dtype == torch.float32 for values in result.scores.values())
    assert all(row["loss"] > 0 for row in result.history)
    save_pruned(result.model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert loaded.dtype == torch.bfloat16
    assert loaded(token_ids(2)).logits.isfinite().all()
    expected = result.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


# --- nothing waits for the device -------------------------------------------------------------------------------------

READS = {"item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "equal"}
COPIES = {"tensor", "as_tensor", "asarray", "from_numpy"}  # of values of the host, to the device
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "_unique2")


class Waits(TorchFunctionMode):
    """Records what would make the host wait if the tensors lay on a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in READS | COPIES:
            self.found.append(name)
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            lists = any(isinstance(part, list) for part in index)
            by_bool = any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in index)
            if lists or by_bool:
                self.found.append(f"{name} by {'a list' if lists else 'bool'}")
        return function(*args, **kwargs or {})


class WaitsInside(TorchDispatchMode):
    """The same below Python's names: what operators call."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in WAITING or (name.startswith("index") and _any_bool(args[1])):
            self.found.append(f"aten.{name}")
        return function(*args, **kwargs or {})


def _any_bool(indices):
    return any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in tree_leaves(indices))


def waits_of(action):
    with Waits() as above, WaitsInside() as below:
        action()
    return above.found + below.found


@pytest.mark.parametrize(
    ("action", "found"),
    [
        (lambda x: x.sum().item(), {"item", "aten._local_scalar_dense"}),
        (lambda x: bool(x.sum() > 0), {"__bool__", "aten._local_scalar_dense"}),
        (lambda x: x.tolist(), {"tolist"}),
        (lambda x: x.cpu(), {"cpu"}),
        (lambda x: x[x > 0], {"__getitem__ by bool", "aten.index"}),
        (lambda x: x[[0, 2]], {"__getitem__ by a list"}),
        (lambda x: (x > 0).nonzero(), {"nonzero", "aten.nonzero"}),
        (lambda x: x + torch.as_tensor(1.0), {"as_tensor"}),
        (lambda x: x[torch.arange(2)] * 2, set()),
    ],
)
def test_what_waits_is_seen(action, found):
    values = torch.arange(4.0)
    assert found <= set(waits_of(lambda: action(values)))
    assert found or not waits_of(lambda: action(values))


@pytest.mark.parametrize("reward", ["lm", "kl"])
@pytest.mark.parametrize(
    "settings",
    [
        {"estimator": "leave_one_out"},
        {"estimator": "disarm", "windows_per_mask": 2},
        {"estimator": "arm", "axes": ("mlp", "attention", "layer_mlp", "layer")},
        {"estimator": "paper", "windows_per_mask": 4, "separate_budgets": True, "direction": "paper"},
    ],
)
def test_no_step_waits_for_the_device(reward, settings, monkeypatch):
    """Nothing of ours does; transformers looks once per forward pass, before the first layer: are rows packed?"""
    model, structure = shared_model("llama"), shared_structure("llama")
    passes, looks = [], []
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: looks.append(1))
    for name in ("_last_hidden", "head"):
        run = getattr(Walk, name)
        monkeypatch.setattr(Walk, name, lambda self, *args, run=run: (passes.append(1), run(self, *args))[1])
    config = PolicyGradientConfig(0.4, **QUICK, **settings, reward=reward, forward_rows=7)
    windows = training.all_windows(Walk(model, structure.layer_paths, samples()), config)
    units = find_units(structure, config, torch.device("cpu"))
    scores = {axis.name: torch.arange(axis.num_units) for axis in units.axes}
    walk = Walk(model, structure.layer_paths, samples())
    assert walk.protocol.layered  # a probe waits, once
    passes.clear(), looks.clear()
    with open_model(walk, structure, units, reward=reward, forward_rows=7) as run:
        learning = training._Learning(run, units, config, windows, scores, seed=3)
        states, found = [learning.state], []
        for _ in range(4):  # two by widths, the turn to units, two by units
            found.append(waits_of(lambda: states.append(learning.one_step(states[-1]))))
    assert [state.step for state in states] == [0, 1, 2, 3, 4]
    assert found == [[], [], [], []]
    assert len(looks) == len(passes) > 0


def test_the_host_looks_every_ten_steps_only(monkeypatch):
    looks = []
    report = training._Learning.report
    monkeypatch.setattr(
        training._Learning, "report", lambda self, bar: (looks.append(self.state.step), report(self, bar))
    )
    model = shared_model("llama")
    learn(model, shared_structure("llama"), PolicyGradientConfig(0.4, **QUICK | {"policy_steps": 23}))
    assert looks == [10, 20, 23]


# --- the learning curve -----------------------------------------------------------------------------------------------


def test_scores_carry_the_history_to_the_result(tmp_path):
    model, config = tiny_model("llama", dtype=torch.float32), PolicyGradientConfig(0.4, **QUICK)
    result = prune(model, config, calibration=samples())
    assert [row["step"] for row in result.history] == [0, 1, 2, 3]
    assert [row["phase"] for row in result.history] == ["widths"] * 2 + ["units"] * 2
    assert isinstance(score(model, result.structure, config, samples()), LearnedScores)
    assert check_scores(result.scores, result.structure, config).history == result.history
    torch.save(result.scores, tmp_path / "scores.pt")
    loaded = torch.load(tmp_path / "scores.pt", weights_only=True)
    assert loaded.keys() == result.scores.keys()
    assert all(torch.equal(loaded[axis], values) for axis, values in result.scores.items())
    known = prune(model, config, calibration=samples(), scores=result.scores)
    assert known.history == result.history
    plain = prune(model, MagnitudeConfig(0.4))
    assert plain.history == []
    assert type(plain.scores) is dict


def test_a_resumed_run_has_the_whole_history(tmp_path, monkeypatch):
    model = tiny_model("llama", dtype=torch.float32)
    config = PolicyGradientConfig(0.4, **QUICK)
    whole = prune(model, config, calibration=samples())
    config = dataclasses.replace(config, state_dir=str(tmp_path))
    losses, left = MaskedModel.losses, [0, 1, 2]

    def interrupted(self, *args):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return losses(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(MaskedModel, "losses", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prune(model, config, calibration=samples())
    resumed = prune(model, config, calibration=samples())
    assert resumed.history == whole.history
    assert len(resumed.history) == 4


def shown(directory):
    """Whether the picture lies there, and whether the card shows it."""
    return (directory / CURVE_NAME).is_file(), f"({CURVE_NAME})" in (directory / "README.md").read_text()


def test_checkpoints_show_the_curve_of_their_own_plan(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(saving, "_draw_widths", lambda plan, path: False)
    model = tiny_model("llama", dtype=torch.float32)
    learned = prune(model, PolicyGradientConfig(0.4, **QUICK), calibration=samples())
    save_pruned(learned.model, tmp_path / "learned")
    assert shown(tmp_path / "learned") == (True, True)
    picture = (tmp_path / "learned" / CURVE_NAME).read_bytes()
    assert picture.startswith(b"\x89PNG")

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "learned")
    save_pruned(loaded, tmp_path / "again")
    save_pruned(loaded, tmp_path / "learned")  # over its own source
    for directory in (tmp_path / "again", tmp_path / "learned"):
        assert shown(directory) == (True, True)
        assert (directory / CURVE_NAME).read_bytes() == picture

    further = prune(loaded, MagnitudeConfig(0.2, axes=("mlp",)))
    save_pruned(further.model, tmp_path / "further")
    save_pruned(further.model, tmp_path / "again")  # over a checkpoint with another one's picture
    for directory in (tmp_path / "further", tmp_path / "again"):
        assert shown(directory) == (False, False)


def test_one_step_is_no_curve(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "_draw_widths", lambda plan, path: False)
    config = PolicyGradientConfig(0.4, **QUICK | {"policy_steps": 1, "policy": "widths"})
    result = prune(tiny_model("llama", dtype=torch.float32), config, calibration=samples())
    assert len(result.history) == 1
    save_pruned(result.model, tmp_path / "out")
    assert shown(tmp_path / "out") == (False, False)
