"""Saving: all or nothing, complete whichever way it is done, and a damaged checkpoint is recognised."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import resource
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
import typer
from huggingface_hub import ModelCard
from pruned import logits, pruned_llama, pruned_plan, tiny_tokenizer

from hf_prune import atomic
from hf_prune.checkpoint import saving
from hf_prune.checkpoint.files import CODE_NAME, PICTURE_NAME, PLAN_NAME
from hf_prune.checkpoint.saving import install_save_hook, load_plan, save_pruned, verify_checkpoint
from hf_prune.cli.flags import read_config
from hf_prune.cli.main import app
from hf_prune.config import MagnitudeConfig
from hf_prune.errors import CheckpointError
from hf_prune.report.card import model_card
from hf_prune.report.html import html_page

COMPLETE = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "pruning_plan.json",
    "report.html",
    "tokenizer.json",
    "tokenizer_config.json",
    "widths.png",
}


def load(directory):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory).eval()


def names(directory):
    return {path.name for path in Path(directory).iterdir()}


def contents(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.fixture(autouse=True)
def _no_pictures(request, monkeypatch):
    """Drawing takes longer than everything else here; one test does it."""
    if request.function is not test_widths_picture_is_drawn:
        monkeypatch.setattr(saving, "_draw_widths", lambda plan, path: bool(path.write_bytes(b"png")))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One saved heterogeneous checkpoint, to be copied."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoint"
    model, plan = pruned_llama()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "_draw_widths", lambda plan, path: bool(path.write_bytes(b"png")))
        save_pruned(model, directory, plan=plan, tokenizer=tiny_tokenizer())
    return directory


@pytest.fixture
def checkpoint(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uniform", [True, False])
def test_saved_checkpoint_is_complete_and_gives_the_same_logits(tmp_path, uniform):
    from transformers import AutoTokenizer

    model, plan = pruned_llama(uniform)
    save_pruned(model, tmp_path / "out", plan=plan, tokenizer=tiny_tokenizer())
    assert names(tmp_path / "out") == COMPLETE | (set() if uniform else {CODE_NAME})
    assert names(tmp_path) == {"out"}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert ("auto_map" in config) == (not uniform)
    assert load_plan(tmp_path / "out") == plan
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w3 w4")["input_ids"] == [6, 7]
    verify_checkpoint(tmp_path / "out")


def test_report_is_one_file_with_its_pictures(saved):
    page = (saved / "report.html").read_text(encoding="utf-8")
    assert "<h1>checkpoint</h1>" in page
    assert "data:image/png;base64,cG5n" in page
    assert not re.findall(r"""(?:src|href)=["'](?!data:|https://arxiv|https://huggingface)""", page)
    assert "<!--" not in page
    assert "base_model:" not in page


def test_html_in_a_page_is_shown_and_not_run(tmp_path):
    (tmp_path / "a.png").write_bytes(b"png")
    page = html_page("# <script>x</script>\n\n![a](a.png) ![b](../a.png) ![c](missing.png)", "<b>", tmp_path)
    assert "<script>" not in page
    assert "<title>&lt;b&gt;</title>" in page
    assert page.count("data:image/png") == 1


def test_card_has_the_command_that_makes_the_plan(tmp_path):
    config = MagnitudeConfig(0.3, norm="l1", layers="1", protect=("layers.0.*", "hidden"), axes=("mlp", "attention"))
    config = dataclasses.replace(config, allocation={"mlp": 2, "attention": 1})
    model, plan = pruned_llama()
    save_pruned(model, tmp_path / "out", plan=dataclasses.replace(plan, config=config))
    (line,) = re.findall("^hf-prune prune .*$", (tmp_path / "out/README.md").read_text(), flags=re.MULTILINE)
    context = typer.main.get_command(app).commands["prune"].make_context("prune", shlex.split(line)[2:])
    flags = {name: context.params[name] for name in ("method", "pruning_ratio", "settings")}
    assert read_config(None, flags) == config


def test_sharded(tmp_path):
    model, _ = pruned_llama()
    save_pruned(model, tmp_path / "out", max_shard_size=40_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    verify_checkpoint(tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_nothing_is_pickled_and_files_follow_the_umask(saved):
    assert not [path for path in saved.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert {path.stat().st_mode & 0o777 for path in saved.iterdir()} == {0o666 & ~_umask()}
    assert saved.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


# --- all or nothing ---------------------------------------------------------------------------------------------------


def _fail_at(monkeypatch, step, error):
    """Make one step of saving raise `error`, as close to the disk as it can be."""
    from transformers import PreTrainedTokenizerBase

    owner, attribute = {
        "weights": (sys.modules["transformers.modeling_utils"], "safe_save_file"),
        "plan": (type(pruned_plan({})), "save"),
        "tokenizer": (PreTrainedTokenizerBase, "save_pretrained"),
        "take over": (shutil, "copy2"),
        "picture": (saving, "_draw_widths"),
        "flush": (os, "fsync"),
        "move away": (Path, "rename"),
        "move in": (Path, "rename"),
    }[step]
    original, calls = getattr(owner, attribute), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == (2 if step == "move in" else 1):
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, attribute, failing)
    return calls


STEPS = ["weights", "plan", "tokenizer", "take over", "picture", "flush", "move away", "move in"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_save_changes_nothing(checkpoint, monkeypatch, step, error):
    (checkpoint / "LICENSE").write_text("free")
    before = contents(checkpoint)
    model, plan = pruned_llama(uniform=True)
    with monkeypatch.context() as patch:
        calls = _fail_at(patch, step, error)
        expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CheckpointError
        with pytest.raises(expected, match="No space left" if expected is CheckpointError else None):
            save_pruned(model, checkpoint, plan=plan, tokenizer=tiny_tokenizer())
    assert calls
    assert contents(checkpoint) == before
    assert names(checkpoint.parent) == {checkpoint.name}
    assert model.config.to_dict().get("auto_map") is None
    save_pruned(model, checkpoint, plan=plan)  # and the next one works
    assert torch.equal(logits(load(checkpoint)), logits(model))


@pytest.mark.parametrize("step", ["weights", "flush"])
def test_a_failed_first_save_leaves_nothing(tmp_path, monkeypatch, step):
    model, _ = pruned_llama()
    _fail_at(monkeypatch, step, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(CheckpointError, match="No space left"):
        save_pruned(model, tmp_path / "out")
    assert names(tmp_path) == set()


def test_a_limit_on_file_size_is_met_by_the_real_writer(checkpoint):
    before, limits = contents(checkpoint), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="weights and configuration"):
            save_pruned(pruned_llama()[0], checkpoint)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(checkpoint) == before
    assert names(checkpoint.parent) == {checkpoint.name}


def test_too_full_a_disk_is_seen_before_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="1,000 are free"):
        save_pruned(pruned_llama()[0], tmp_path / "out")
    assert names(tmp_path) == set()


def test_files_left_by_a_killed_swap_are_moved_back(checkpoint):
    before = contents(checkpoint)
    left = checkpoint.with_name(f".{checkpoint.name}.new-0123abcd")
    left.mkdir()
    checkpoint.rename(left / ".replaced")
    with pytest.raises(RuntimeError, match="stop"), atomic.replaced_directory(checkpoint):
        raise RuntimeError("stop")
    assert contents(checkpoint) == before
    assert names(checkpoint.parent) == {checkpoint.name}


# --- what may be overwritten ------------------------------------------------------------------------------------------


def test_overwriting_takes_over_what_is_not_the_model(checkpoint):
    (checkpoint / "LICENSE").write_text("free")
    (checkpoint / "LICENSES").mkdir()
    (checkpoint / "LICENSES" / "data").write_text("free too")
    for name in ("README.md", PLAN_NAME):
        (checkpoint / name).unlink()
    shutil.move(checkpoint / "model.safetensors", checkpoint / "model-00001-of-00001.safetensors")
    tokenizer = (checkpoint / "tokenizer.json").read_bytes()
    model, plan = pruned_llama(uniform=True)
    save_pruned(model, checkpoint, plan=plan)
    assert names(checkpoint) == COMPLETE | {"LICENSE", "LICENSES"}
    assert (checkpoint / "LICENSES" / "data").read_text() == "free too"
    assert (checkpoint / "tokenizer.json").read_bytes() == tokenizer
    assert load_plan(checkpoint) == plan


@pytest.mark.parametrize("foreign", ["thesis.tex", "checkpoint-500", ".git"])
def test_a_directory_with_other_things_is_refused(checkpoint, foreign):
    (checkpoint / foreign).mkdir() if "." not in foreign[1:] else (checkpoint / foreign).write_text("")
    before = names(checkpoint)
    with pytest.raises(CheckpointError, match=foreign):
        save_pruned(pruned_llama()[0], checkpoint)
    assert names(checkpoint) == before


def test_refused_before_anything_is_written(tmp_path, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    dense = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(CheckpointError, match="not pruned"):
        save_pruned(dense, tmp_path / "out")
    model, plan = pruned_llama()
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp the width 48.*40"):
        save_pruned(pruned_llama()[0], tmp_path / "out", plan=pruned_plan({"layers.1.attention": (0,)}))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        save_pruned(model, tmp_path / "file")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(CheckpointError, match="working directory"):
        save_pruned(model, ".", plan=plan)
    assert names(tmp_path) == {"file", "here"}


def test_a_model_with_an_adapter_is_refused(tmp_path):
    from peft import LoraConfig, get_peft_model

    model, _ = pruned_llama()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(CheckpointError, match="merge_and_unload"):
        save_pruned(adapted, tmp_path / "out")
    install_save_hook()
    adapted.save_pretrained(tmp_path / "adapter")
    assert names(tmp_path / "adapter") == {"README.md", "adapter_config.json", "adapter_model.safetensors"}


def test_through_a_symbolic_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    save_pruned(pruned_llama()[0], tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    verify_checkpoint(tmp_path / "disk")


# --- the hook in save_pretrained --------------------------------------------------------------------------------------


def test_plain_save_pretrained_of_a_loaded_model_is_complete(saved, tmp_path):
    install_save_hook()
    model = load(saved)
    model.save_pretrained(tmp_path / "again")
    assert {PLAN_NAME, CODE_NAME} <= names(tmp_path / "again")
    assert load_plan(tmp_path / "again") == load_plan(saved)
    verify_checkpoint(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


def test_hook_removes_what_belongs_to_another_model(checkpoint):
    install_save_hook()
    model, _ = pruned_llama(uniform=True)
    model.config.auto_map = {"AutoModelForCausalLM": "modeling_hf_prune.LlamaForCausalLM"}
    del model._pruning_plan
    model.save_pretrained(checkpoint)
    assert PLAN_NAME not in names(checkpoint)
    assert CODE_NAME not in names(checkpoint)
    assert "auto_map" not in json.loads((checkpoint / "config.json").read_text())
    verify_checkpoint(checkpoint)


def test_hook_leaves_other_models_and_processes_alone(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

    install_save_hook()
    once = PreTrainedModel.save_pretrained
    install_save_hook()
    assert PreTrainedModel.save_pretrained is once
    dense = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    dense.save_pretrained(tmp_path / "dense")
    assert names(tmp_path / "dense") == {"config.json", "generation_config.json", "model.safetensors"}
    pruned_llama()[0].save_pretrained(tmp_path / "other process", is_main_process=False)
    assert names(tmp_path / "other process") == set()


def test_models_with_code_of_their_own_keep_it(tmp_path):
    install_save_hook()
    model, _ = pruned_llama()
    own = {"AutoModelForCausalLM": "modeling_special.Special"}
    model.config.auto_map = dict(own)
    model.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["auto_map"] == own
    assert CODE_NAME not in names(tmp_path / "out")


def test_trainer_saves_complete_checkpoints(tmp_path):
    from transformers import Trainer, TrainingArguments

    install_save_hook()
    model, plan = pruned_llama()
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    data = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 2
    Trainer(model, args, train_dataset=data).train()
    verify_checkpoint(tmp_path / "checkpoint-1")
    assert load_plan(tmp_path / "checkpoint-1") == plan
    assert CODE_NAME in names(tmp_path / "checkpoint-1")
    assert torch.equal(logits(load(tmp_path / "checkpoint-1")), logits(model.eval()))


# --- damaged checkpoints ----------------------------------------------------------------------------------------------


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def _rewrite_weights(directory, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


UP = "model.layers.2.mlp.up_proj.weight"
DAMAGES = {
    "config.json": lambda d: (d / "config.json").unlink(),
    "config.json is not readable JSON": lambda d: _truncate(d / "config.json"),
    "tokenizer_config.json is not readable JSON": lambda d: (d / "tokenizer_config.json").write_text("{"),
    "generation_config.json is not readable JSON": lambda d: (d / "generation_config.json").write_bytes(b"\xff"),
    "neither model.safetensors nor": lambda d: (d / "model.safetensors").unlink(),
    "model.safetensors is not a readable safetensors file .*cut off": lambda d: _truncate(d / "model.safetensors"),
    "model.safetensors is not a readable": lambda d: (d / "model.safetensors").write_bytes(b"<html>not found</html>"),
    "model.safetensors is not a readable safetensors file": lambda d: (d / "model.safetensors").write_bytes(b""),
    f"{UP} is missing": lambda d: _rewrite_weights(d, lambda t: t.pop(UP)),
    r"up_proj.weight has shape \[3, 32\], expected \[48, 32\]": lambda d: _rewrite_weights(
        d, lambda t: t.update({UP: torch.zeros(3, 32)})
    ),
    "x is not part of the model": lambda d: _rewrite_weights(d, lambda t: t.update(x=torch.zeros(3))),
    "pruning_plan.json is not readable JSON": lambda d: _truncate(d / PLAN_NAME),
    "pruning_plan.json holds a JSON list": lambda d: (d / PLAN_NAME).write_text("[]"),
    "pruning_plan.json is not a valid pruning plan": lambda d: edit_json(d / PLAN_NAME, lambda p: p.update(format=99)),
    "does not give the widths": lambda d: edit_json(d / PLAN_NAME, lambda p: p["kept_indices"].pop("layers.0.mlp")),
    f"points to {CODE_NAME}, which is missing": lambda d: (d / CODE_NAME).unlink(),
    "class 'Nonsense'": lambda d: edit_json(d / "config.json", lambda c: c.update(architectures=["Nonsense"])),
    "not a config that transformers can read": lambda d: edit_json(d / "config.json", lambda c: c.pop("model_type")),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damage_is_named(checkpoint, message):
    verify_checkpoint(checkpoint)
    DAMAGES[message](checkpoint)
    with pytest.raises(CheckpointError, match=message):
        verify_checkpoint(checkpoint)


@pytest.mark.parametrize("tied", [False, True])
def test_damaged_shards_are_named(tmp_path, tied):
    install_save_hook()
    model, _ = pruned_llama()
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(tmp_path, max_shard_size=40_000)
    verify_checkpoint(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    original = index.read_text()
    edit_json(index, lambda i: i["weight_map"].update(ghost="model-00001-of-00003.safetensors"))
    index.write_text(index.read_text().replace("-of-00003", f"-of-{len(list(tmp_path.glob('model-*'))):05d}"))
    with pytest.raises(CheckpointError, match="places ghost"):
        verify_checkpoint(tmp_path)
    index.write_text(original)
    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises(CheckpointError, match=r"names model-00002-of-.*missing"):
        verify_checkpoint(tmp_path)


def test_verifying_reads_no_weights_and_knows_models_that_are_stored_under_other_names(tmp_path, monkeypatch):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=16, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    assert b"experts.0.w1" in data  # the file has one tensor per expert, the model one for all
    verify_checkpoint(tmp_path)
    header = 8 + int.from_bytes(data[:8], "little")
    (tmp_path / "model.safetensors").write_bytes(data[:header] + bytes(len(data) - header))
    verify_checkpoint(tmp_path)


@pytest.mark.parametrize("where", ["no/such/directory", "no such name", "someone/not-cached"])
def test_load_plan_from_nowhere(where, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="no plan could be loaded from"):
        load_plan(where)


def test_load_plan_of_a_checkpoint_without_one(tmp_path):
    assert load_plan(tmp_path) is None


# --- the model card ---------------------------------------------------------------------------------------------------


def test_card_of_a_heterogeneous_model(tmp_path):
    model, plan = pruned_llama()
    report = {"perplexity (WikiText-2)": {"dense": 41.66, "pruned": 50.123}, "size": 12}
    save_pruned(model, tmp_path / "small-llama", plan=plan, report=report)
    card = ModelCard.load(tmp_path / "small-llama/README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["base_model"] == "someone/dense-llama"
    assert data["base_model_relation"] == "finetune"
    assert data["pipeline_tag"] == "text-generation"
    assert {"hf_prune", "pruned"} <= set(data["tags"])
    num_parameters = sum(p.numel() for p in model.parameters())
    dense = num_parameters + 3 * 32 * 8 + 2 * 32 * 8 * 3  # 8 MLP channels, one group with two query heads
    for text in (
        "decoder layers | 20.00 % | 10.00 %",
        f"parameters | {dense:,} | {num_parameters:,}",
        "| mlp | 48 | 0: **40**, 1–2: **48** |",
        "| attention | 2 | 0: **2**, 1: **1**, 2: **2** |",
        f"]({PICTURE_NAME})",
        "import hf_prune",
        "trust_remote_code=True",
        'from_pretrained("small-llama")',
        "| perplexity (WikiText-2) | 41.66 | 50.12 |  |",
        "| size |  |  | 12 |",
        '"pruning_ratio": 0.2',
    ):
        assert text in card.content, text
    code = card.text.split("```python\n")[1].split("```")[0]
    compile(code, "example", "exec")


def test_card_of_a_uniform_model_needs_no_plugin():
    model, plan = pruned_llama(uniform=True)
    card = model_card(model.config, num_parameters=model.num_parameters(), plan=plan)
    assert "no plugin and no remote code needed" in card.content
    assert "import hf_prune" not in card.content
    assert "trust_remote_code" not in card.content
    assert "Evaluation" not in card.content
    assert "| mlp | 48 | 0–2: **40** |" in card.content


def test_card_keeps_metadata_and_hand_written_text(checkpoint):
    (checkpoint / "README.md").write_text(
        "---\nlicense: mit\ntags: [mine]\ndatasets: [someone/data]\nlibrary_name: peft\n---\n\n"
        "# About\n\nMy own words.\n"
    )
    model, plan = pruned_llama()
    for _ in range(2):
        save_pruned(model, checkpoint, plan=plan)
        card = ModelCard.load(checkpoint / "README.md")
        data = card.data.to_dict()
        assert data["license"] == "mit"
        assert data["datasets"] == ["someone/data"]
        assert data["tags"] == ["mine", "hf_prune", "pruned"]
        assert data["library_name"] == "transformers"
        assert card.content.count("My own words.") == 1
        assert card.content.count("## What was removed") == 1


def test_card_takes_the_licence_from_the_base_and_drops_stock_text():
    model, plan = pruned_llama()
    stock = "---\ntags: [x]\n---\n\nThis model card has been automatically generated.\n"
    base = "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\nlanguage: en\nx: 3\n---\nBase."
    card = model_card(model.config, num_parameters=1, plan=plan, base_card=base, existing=stock)
    data = card.data.to_dict()
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "llama3", "LICENSE")
    assert data["language"] == "en"
    assert "automatically generated" not in card.content
    kept = model_card(model.config, num_parameters=1, base_card=base, existing="---\nlicense: mit\n---\n")
    assert kept.data.to_dict()["license"] == "mit"


def test_card_names_removed_layers_and_no_local_base_model(tmp_path):
    model, _ = pruned_llama(uniform=True)
    model.config.pruning_config |= {"base_model_name_or_path": str(tmp_path), "widths": {}}
    plan = pruned_plan({})
    plan = dataclasses.replace(plan, num_units=plan.num_units | {"layers": 3}, kept_indices={"layers": (0, 2)})
    model.config.pruning_config["widths"] = plan.widths
    card = model_card(model.config, num_parameters=1, plan=plan)
    assert "base_model" not in card.data.to_dict()
    assert f"`{tmp_path.name}`" in card.content
    assert "| layers removed |  | 1 |" in card.content
    assert "| mlp | 48 | 0–2: **48** |" in card.content


def test_widths_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    model, plan = pruned_llama()
    save_pruned(model, tmp_path / "out", plan=plan)
    assert (tmp_path / "out" / PICTURE_NAME).read_bytes().startswith(b"\x89PNG")
