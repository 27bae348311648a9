"""A pruned model as the draft of its dense parent: the text is the dense model's, what is counted is what ran."""

from __future__ import annotations

import copy
import json

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hf_prune import prune
from hf_prune.checkpoint.saving import save_pruned
from hf_prune.cli.main import app
from hf_prune.config import MagnitudeConfig
from hf_prune.errors import ConfigError
from hf_prune.evaluation.assisting import measure_assisted


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assisting")
    dense = AutoModelForCausalLM.from_pretrained(tiny.write_checkpoint(folder / "dense", num_layers=3))
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.mul_(2.0)  # sharper than at initialisation: greedy texts differ between models
    dense.save_pretrained(folder / "dense")
    tokenizer = AutoTokenizer.from_pretrained(folder / "dense")
    pruned = prune(dense, MagnitudeConfig(0.2, axes=("mlp", "attention", "layer_attention"), allocation="global")).model
    save_pruned(pruned, folder / "pruned", tokenizer=tokenizer)
    return folder, dense.eval(), pruned.eval(), tokenizer, tiny.write_text(folder / "text.txt", 400, seed=2)


def test_the_text_is_that_of_the_dense_model(material):
    _, dense, pruned, tokenizer, text = material
    ids = tokenizer(text.read_text(), return_tensors="pt").input_ids[:, :16]
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    alone, draft = dense.generate(ids, **settings), pruned.generate(ids, **settings)
    assert torch.equal(dense.generate(ids, assistant_model=pruned, **settings), alone)
    assert not torch.equal(draft, alone), "the draft must differ, or this proves nothing"


def test_passes_and_acceptance_are_counted(material):
    _, dense, pruned, tokenizer, text = material
    sizes = {"prompt_len": 16, "new_tokens": 24, "num_prompts": 4}
    own = measure_assisted(dense, copy.deepcopy(dense), tokenizer, text.read_text(), **sizes)
    assert own.same_tokens == own.acceptance == 1.0, "a model accepts all of its own drafts"
    found = measure_assisted(dense, pruned, tokenizer, text.read_text(), **sizes)
    assert found.same_tokens == 1.0
    assert 0 <= found.acceptance < 1
    assert 1 <= found.tokens_per_pass < own.tokens_per_pass
    assert not dense._forward_hooks
    assert not pruned._forward_hooks


def test_another_vocabulary_is_refused(material):
    from models import tiny_model

    _, dense, _, tokenizer, text = material
    with pytest.raises(ConfigError, match="found 96 tokens, expected 64"):
        measure_assisted(dense, tiny_model("llama", dtype=torch.float32), tokenizer, text.read_text())


@pytest.mark.slow
def test_eval_measures_a_draft(material):
    folder = material[0]
    command = ["eval", folder / "pruned", "--text", folder / "text.txt", "--window", 32, "--assists", folder / "dense"]
    result = CliRunner().invoke(app, [*map(str, command), "--json"])
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["draft same_tokens"] == 1.0
    assert 0 <= values["draft acceptance"] <= 1 <= values["draft tokens_per_pass"]
    assert values["draft tokens_per_s"] > 0 < values["draft dense_tokens_per_s"]
