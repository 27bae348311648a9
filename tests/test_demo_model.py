"""The bundled demo model: small, self-contained, as good as its log says, and made by the script that claims to."""

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "hf_prune" / "demo_model"
FILES = {
    "README.md",
    "calibration.txt",
    "config.json",
    "evaluation.txt",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "train_log.json",
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_demo_model", ROOT / "examples" / "train_demo_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def log() -> dict:
    return json.loads((FOLDER / "train_log.json").read_text(encoding="utf-8"))


def test_folder_is_complete_and_at_most_5_mb() -> None:
    assert {path.name for path in FOLDER.iterdir()} == FILES
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 5_000_000


def test_loads_as_a_stock_model_in_float32_with_tied_embeddings(model, log) -> None:
    assert type(model) is LlamaForCausalLM
    assert model.dtype == torch.float32
    assert model.config.use_cache
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.num_parameters() == log["num_parameters"]


@pytest.mark.parametrize("name", ["calibration", "evaluation"])
def test_tokenizer_gives_the_text_back_unchanged(tokenizer, model, name) -> None:
    text = (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    token_ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(token_ids) == text
    assert max(token_ids) < model.config.vocab_size == len(tokenizer)
    assert tokenizer.eos_token_id == model.config.eos_token_id


def test_texts_share_no_paragraph() -> None:
    paragraphs = [
        {line for line in (FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines() if len(line) > 80}
        for name in ("calibration", "evaluation")
    ]
    assert min(map(len, paragraphs)) > 50
    assert not paragraphs[0] & paragraphs[1]


def test_perplexity_is_the_recorded_one(model, tokenizer, log) -> None:
    text = (FOLDER / "evaluation.txt").read_text(encoding="utf-8")
    windows = torch.tensor(tokenizer(text)["input_ids"]).split(256)
    with torch.inference_mode():
        losses = [model(ids[None], labels=ids[None]).loss.item() for ids in windows if len(ids) == 256]
    assert math.exp(sum(losses[:20]) / 20) < 1.3 * log["evaluation_perplexity"]
    assert math.exp(sum(losses) / len(losses)) == pytest.approx(log["evaluation_perplexity"], rel=1e-3)


def test_generates_the_same_greedy_text_with_and_without_cache(model, tokenizer) -> None:
    inputs = tokenizer("The old man", return_tensors="pt", return_token_type_ids=False)
    cached, uncached = (
        model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=use_cache) for use_cache in (True, False)
    )
    assert cached.tolist() == uncached.tolist()


def test_script_trains_goes_on_from_its_checkpoint_and_saves_a_loadable_folder(script, tmp_path) -> None:
    book = "\n".join(f"Paragraph {i} tells of {i * i} sheep that slept on hill number {i % 7}." for i in range(60))
    data = tmp_path / "books.txt"
    data.write_text(f"{book}\n\n{book.replace('sheep', 'dogs')}\n\n{book.replace('hill', 'ship')}\n", encoding="utf-8")

    def train(steps: int, seed: int) -> dict:
        script.main(
            data=data,
            output=tmp_path / "model",
            work_dir=tmp_path / "work",
            calibration_books=(1,),
            evaluation_books=(2,),
            held_out_characters=3000,
            steps=steps,
            batch_size=2,
            window=16,
            vocab_size=300,
            hidden_size=32,
            intermediate_size=48,
            num_layers=2,
            save_steps=1,
            threads=1,
            seed=seed,
        )
        return json.loads((tmp_path / "model" / "train_log.json").read_text(encoding="utf-8"))

    first = train(steps=2, seed=0)
    assert [step for step, _ in first["loss"]] == [1, 2]
    second = train(steps=3, seed=1)
    assert second["loss"][:2] == first["loss"], "the second run started anew"
    assert (tmp_path / "work" / "checkpoint-3").is_dir()

    folder = tmp_path / "model"
    assert {path.name for path in folder.iterdir()} == FILES - {"README.md"}
    assert str(tmp_path) not in "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.json"))
    assert "ship" in (folder / "evaluation.txt").read_text(encoding="utf-8")
    assert "dogs" in (folder / "calibration.txt").read_text(encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.num_parameters() == second["num_parameters"]
    assert model.config.num_hidden_layers == 2
    assert len(AutoTokenizer.from_pretrained(folder)) == 300


def test_script_refuses_books_that_are_not_there(script, tmp_path) -> None:
    data = tmp_path / "books.txt"
    data.write_text("One.\n\nTwo.\n", encoding="utf-8")
    with pytest.raises(script.typer.BadParameter, match="has 2 books"):
        script.main(data=data, output=tmp_path / "model", work_dir=tmp_path / "work")
    assert not (tmp_path / "model").exists()
