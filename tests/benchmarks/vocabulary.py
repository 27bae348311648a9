"""How many tokens English text needs, and what a model of only those is worth: docs/vocabulary.json and a table.

Tokens are chosen by the texts of `chosen_by`; each model is measured on texts that took no part in that, one document
after the other, as nats per character: models that cut text differently can be compared in nothing else.

python tests/benchmarks/vocabulary.py MODEL   # a directory, such as that of SmolLM2-135M; DATA: HF_PRUNE_DATA
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from hf_prune import apply_plan, infer_structure, kept_tokens, prune_tokenizer, vocabulary
from hf_prune.layers.losses import next_token
from hf_prune.layers.weights import inference
from hf_prune.loading import load_model, load_tokenizer
from hf_prune.plan import bare_plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DATA = Path(os.environ.get("HF_PRUNE_DATA", "../shared")) / "data"
DOCS = Path(__file__).parents[2] / "docs"
COVERAGES = (1.0, 0.9999, 0.999, 0.99)
NUM_CHARS = 12_000
"""Characters of each text that models are measured on, to the end of a document."""
SEPARATOR = "<|endoftext|>"
"""Goes before each document, so that its first token is predicted too."""


def main() -> None:
    """Choose, measure, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model, dtype="float32"), load_tokenizer(arguments.model, required=True)
    assert tokenizer is not None
    structure, texts = infer_structure(model), held_out_texts()
    vocabulary._counts = functools.cache(vocabulary._counts)  # type: ignore[assignment]  # texts are cut once
    rows = [{"tokens": structure.axes["vocab"].num_units, **measured(model, tokenizer, texts)}]
    with tempfile.TemporaryDirectory() as folder:
        sources = chosen_by(Path(folder))
        for coverage in COVERAGES:
            kept = kept_tokens(model, tokenizer, sources, coverage=coverage)
            smaller = apply_plan(model, structure, bare_plan(structure, {"vocab": kept}))
            row = {"coverage": coverage, "tokens": len(kept)}
            rows.append(row | measured(smaller, prune_tokenizer(tokenizer, kept), texts))
            print(json.dumps(rows[-1]), flush=True)
    result = {
        "model": model.config.model_type,
        "chosen_by": [Path(source).name for source in sources],
        "characters": {name: sum(map(len, documents)) for name, documents in texts.items()},
        "documents": {name: len(documents) for name, documents in texts.items()},
        "rows": rows,
    }
    (DOCS / "vocabulary.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(rows)))


def chosen_by(folder: Path) -> list[str]:
    """WikiText-2, novels, and instructions with their answers as one text."""
    instructions = folder / "instructions.txt"
    records = [record for path in sorted((DATA / "instruct").glob("*.jsonl")) for record in read(path)]
    instructions.write_text(
        "\n\n".join("\n".join(str(value) for value in record.values() if value) for record in records), encoding="utf-8"
    )
    return [str(DATA / "wikitext2/train.txt"), str(DATA / "prose/novels.txt"), str(instructions)]


def held_out_texts() -> dict[str, list[str]]:
    """Documents of the texts that models are measured on."""
    boolq = (
        record["context"].removeprefix("Passage: ").split("\nQuestion:")[0] for record in read_zero_shot("boolq_dev")
    )
    lambada = (record["context"] + record["choices"][0] for record in read_zero_shot("lambada_openai"))
    return {"BoolQ passages": first(dict.fromkeys(boolq)), "LAMBADA": first(lambada)}


def read_zero_shot(name: str) -> list[dict[str, Any]]:
    """Records of one task."""
    return read(DATA / "zeroshot" / f"{name}.jsonl")


def read(path: Path) -> list[dict[str, Any]]:
    """Records of a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def first(documents: Any) -> list[str]:
    """The first documents, `NUM_CHARS` characters together."""
    found: list[str] = []
    for document in documents:
        if sum(map(len, found)) >= NUM_CHARS:
            break
        found.append(document.strip())
    return found


def measured(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: dict[str, list[str]]) -> dict[str, Any]:
    """Size, and per text the tokens and `exp` of the mean negative log-likelihood for each character."""
    row: dict[str, Any] = {"parameters": model.num_parameters()}
    for name, documents in texts.items():
        nll, num_tokens = 0.0, 0
        with inference(model):
            for document in tqdm(documents, desc=name, leave=False):
                ids = torch.tensor([tokenizer(SEPARATOR + document, add_special_tokens=False)["input_ids"]])
                scores = model(input_ids=ids, use_cache=False).logits[0, :-1]
                nll += next_token(scores, ids[0, 1:]).sum(dtype=torch.float64).item()
                num_tokens += ids.shape[1] - 1
        num_chars = sum(map(len, documents))
        row[name] = {"tokens": num_tokens, "perplexity_per_character": math.exp(nll / num_chars)}
    return row


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows as Markdown."""
    texts = [name for name in rows[0] if isinstance(rows[0][name], dict)]
    lines = [
        f"| tokens of the text covered | tokens kept | parameters | {' | '.join(texts)} |",
        "|---|--:|--:|" + "--:|" * len(texts),
    ]
    for row in rows:
        covered = f"{100 * row['coverage']:g} %" if "coverage" in row else "(dense)"
        cells = [f"{row[name]['perplexity_per_character']:.4f} ({row[name]['tokens']:,} tokens)" for name in texts]
        less = 1 - row["parameters"] / rows[0]["parameters"]
        size = f"{row['parameters'] / 1e6:.1f} M" + (f" (−{100 * less:.1f} %)" if less else "")
        lines.append(f"| {covered} | {row['tokens']:,} | {size} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
