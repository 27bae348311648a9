"""Push to a stand-in for the Hub on 127.0.0.1 and read back, in a subprocess; nothing leaves the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from huggingface_hub import ModelCard
from pruned import logits, pruned_llama

from hf_prune.checkpoint.hub import push_to_hub
from hf_prune.checkpoint.saving import install_save_hook
from hf_prune.errors import CheckpointError

TESTS = Path(__file__).parent

# Two subprocesses, one with the plugin and one without: importing transformers is what takes the time.
WITH_PLUGIN = """
import sys, torch
sys.path.insert(0, {tests!r})
from pruned import logits, pruned_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from hf_prune.checkpoint import saving
from hf_prune.checkpoint.hub import push_to_hub
from hf_prune.checkpoint.saving import install_save_hook, load_plan
from hf_prune.errors import CheckpointError

saving._draw_widths = lambda plan, path: bool(path.write_bytes(b"png"))
model, plan = pruned_llama()
tokenizer = tiny_tokenizer()
push_to_hub(model, "small", plan=plan, tokenizer=tokenizer, private=True, max_shard_size=40_000)
print(push_to_hub(model, "tester/small", plan=plan, tokenizer=tokenizer, report={{"perplexity": 3.0}}))
push_to_hub(model, "tester/small", plan=plan, revision="smaller", commit_message="On a branch")
print(push_to_hub(model, "tester/small", plan=plan, create_pr=True))
push_to_hub(pruned_llama(uniform=True)[0], "someone/uniform")
install_save_hook()
model.push_to_hub("tester/plain")
model.save_pretrained("saved", push_to_hub=True, repo_id="tester/saved")

for repo in ("tester/small", "tester/plain", "tester/saved"):
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(repo)), logits(model)), repo
for revision in ("main", "smaller"):  # what came from the Hub keeps its plan when it is saved again
    again = AutoModelForCausalLM.from_pretrained("tester/small", revision=revision)
    again.save_pretrained(f"again-{{revision}}")
    assert load_plan(f"again-{{revision}}") == plan, revision
    again.push_to_hub(f"tester/again-{{revision}}")
    assert load_plan(f"tester/again-{{revision}}") == plan, revision
assert AutoTokenizer.from_pretrained("tester/small")("w3 w4")["input_ids"] == [6, 7]
assert load_plan("tester/small") == plan
assert load_plan("tester/small", revision="smaller") == plan
assert load_plan("someone/dense-llama") is None

def refused(function, *arguments):
    try:
        function(*arguments)
    except CheckpointError as error:
        return str(error)
    raise SystemExit("was not refused")

assert "could not push to tester/forbidden" in refused(push_to_hub, model, "tester/forbidden")
assert "someone/nothing" in refused(load_plan, "someone/nothing")
"""

WITHOUT_PLUGIN = """
import sys, torch
from transformers import AutoModelForCausalLM
expected, uniform = torch.load(sys.argv[1])
ids = torch.arange(24).reshape(2, 12)
model = AutoModelForCausalLM.from_pretrained("someone/uniform")
assert torch.equal(model(input_ids=ids).logits, uniform)
for source in ("tester/small", sys.argv[2]):
    try:
        AutoModelForCausalLM.from_pretrained(source)
    except Exception:
        pass
    else:
        raise SystemExit("loaded wrongly")
for source in ("tester/small", sys.argv[2]):  # the first of these installs the loader
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
    assert torch.equal(model(input_ids=ids).logits, expected)
assert not any(name == "hf_prune" or name.startswith("hf_prune.") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        card = b"---\nlicense: mit\nlanguage: en\n---\n# The dense model\n"
        server.add("someone/dense-llama", **{"README.md": card, "config.json": b"{}"})
        card = b"---\nlicense: apache-2.0\ndatasets:\n- someone/data\n---\n\nMy own words.\n"
        server.add("someone/uniform", **{"README.md": card, "model-00001-of-00002.safetensors": b"old"})
        yield server


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory):
    hub.forbidden = ("commit", "tester/forbidden")
    output = run(hub, tmp_path_factory.mktemp("push"), WITH_PLUGIN.format(tests=str(TESTS)))
    assert output.split() == [
        f"{hub.endpoint}/tester/small/commit/{hub.repos['tester/small'].branches['main']}",
        f"{hub.endpoint}/tester/small/discussions/1",
    ]
    return hub


def run(hub, directory, code, *arguments):
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    env |= {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(directory / "home"),
        "HF_TOKEN": "hf_not_a_real_token",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
        "no_proxy": "*",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=env, cwd=directory, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_what_was_pushed_or_saved_loads_without_plugin(pushed, tmp_path):
    model, _ = pruned_llama()
    torch.save([logits(model), logits(pruned_llama(uniform=True)[0])], tmp_path / "expected.pt")
    install_save_hook()
    model.save_pretrained(tmp_path / "local")
    run(pushed, tmp_path, WITHOUT_PLUGIN, str(tmp_path / "expected.pt"), str(tmp_path / "local"))


def test_repository_holds_the_checkpoint_and_nothing_of_earlier_pushes(pushed):
    repo = pushed.repos["tester/small"]
    assert repo.private
    assert set(repo.files()) == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "modeling_hf_prune.py",
        "pruning_plan.json", "report.html", "tokenizer.json", "tokenizer_config.json", "widths.png",
    }  # fmt: skip
    first = next(tree for tree in repo.commits.values() if tree)
    assert any(name.startswith("model-00001-of-") for name in first)
    assert "modeling_hf_prune.py" not in pushed.repos["someone/uniform"].files()
    assert "model-00001-of-00002.safetensors" not in pushed.repos["someone/uniform"].files()


def test_branch_and_pull_request(pushed):
    repo = pushed.repos["tester/small"]
    assert set(repo.branches) == {"main", "smaller", "refs/pr/1"}
    assert "On a branch" in repo.messages
    assert len({repo.branches[name] for name in repo.branches}) == 3


def test_cards(pushed):
    card = ModelCard(pushed.repos["tester/small"].files()["README.md"].decode())
    data = card.data.to_dict()
    assert (data["license"], data["language"], data["base_model"]) == ("mit", "en", "someone/dense-llama")
    assert 'from_pretrained("tester/small")' in card.content
    assert "| perplexity | 3 |" in card.content
    kept = ModelCard(pushed.repos["someone/uniform"].files()["README.md"].decode())
    assert (kept.data.to_dict()["license"], kept.data.to_dict()["datasets"]) == ("apache-2.0", ["someone/data"])
    assert "My own words." in kept.content
    stock = ModelCard(pushed.repos["tester/plain"].files()["README.md"].decode())
    assert {"hf_prune", "pruned"} <= set(stock.data.tags)  # through model tags, by transformers' own push


def test_companions_go_with_transformers_own_push(pushed):
    for repo_id in ("tester/plain", "tester/saved"):
        files = pushed.repos[repo_id].files()
        assert {"pruning_plan.json", "modeling_hf_prune.py", "config.json", "model.safetensors"} <= set(files), repo_id


def test_revision_and_pull_request_exclude_each_other():
    with pytest.raises(CheckpointError, match="Pass one of the two"):
        push_to_hub(pruned_llama()[0], "tester/small", revision="smaller", create_pr=True)
