"""Tiny checkpoints with tokenizers that llama.cpp knows, and llama.cpp itself, to compare exported models with."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from models import SETTINGS, make_plan

from hf_prune.structure.inference import infer_structure
from hf_prune.surgery.pruning import apply_plan

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCAB = 320
WORDS = (
    "the",
    "river",
    "old",
    "house",
    "light",
    "morning",
    "she",
    "walked",
    "slowly",
    "and",
    "never",
    "spoke",
    "winter",
)

# Name → what stays of the three layers (3 KV groups or more, 40 MLP channels, 36 hidden channels or more).
KEPT: dict[str, dict[str, tuple[int, ...]]] = {
    "dense": {},
    "different": {
        "layers.0.attention": (1,),
        "layers.1.attention": (0, 2),
        "layers.0.mlp": tuple(range(3, 20)),
        "layers.2.mlp": tuple(range(0, 40, 3)),
    },
    "heads": {"layers.0.attention.queries": (0, 3, 5), "layers.1.attention": (0, 2)},
    "no attention": {"layers.attention": (0, 1), "layers.1.mlp": tuple(range(9))},
    "no mlp": {"layers.mlp": (1,), "layers.1.attention": (2,)},
    "no layer": {"layers": (0, 2), "layers.2.mlp": tuple(range(30))},
    "hidden": {"hidden": tuple(range(1, 36, 2)), "layers.1.mlp": tuple(range(30))},
    "uniform": {f"layers.{i}.{axis}": tuple(range(n)) for i in range(3) for axis, n in (("attention", 2), ("mlp", 29))},
}


def tiny_served_model(family: str, kept: str = "dense", **settings: Any) -> PreTrainedModel:
    """A random float32 model of three layers that decides on each token clearly, pruned by one of `KEPT`."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    model_type, values = SETTINGS[family]
    config = CONFIG_MAPPING[model_type](**{**values, "vocab_size": VOCAB, "num_hidden_layers": 3, **settings})
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    structure = infer_structure(model)
    return apply_plan(model, structure, make_plan(structure, KEPT[kept])) if KEPT[kept] else model


def byte_tokenizer(vocab_size: int = VOCAB) -> PreTrainedTokenizerFast:
    """Byte-level BPE of ASCII words, split as GPT-2 does.

    No token is a part of a character: llama.cpp does not show the log-probabilities of those.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=[chr(i) for i in range(33, 127)],
        show_progress=False,
    )
    lines = [" ".join(random.Random(seed).choices(WORDS, k=12)) for seed in range(99)]
    raw.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


def save(path: Path, model: PreTrainedModel, tokenizer: Any = None) -> Path:
    model.save_pretrained(path)
    (tokenizer or byte_tokenizer()).save_pretrained(path)
    return path


@dataclass(frozen=True)
class Completion:
    """What llama.cpp went on with, and how sure it was."""

    ids: list[int]
    top: list[dict[int, float]]
    """The ten likeliest tokens of each step with their log-probabilities."""
    num_prompt_tokens: int


class LlamaCpp:
    """llama.cpp in this process, with one thread and float32 keys and values."""

    def __init__(self, path: Path, num_tokens: int = 64) -> None:
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx, parameters.n_parallel = num_tokens, 1
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.warmup = parameters.fit_params = False
        parameters.verbosity = -1
        self.server = xllamacpp.Server(parameters)

    def complete(self, prompt: str | list[int], num_tokens: int = 8) -> Completion:
        """Go on greedily."""
        asked = {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "logprobs": 10, "ignore_eos": True}
        answer = self.server.handle_completions(asked)
        steps = answer["choices"][0]["logprobs"]["content"]
        top = [{entry["id"]: entry["logprob"] for entry in step["top_logprobs"]} for step in steps]
        return Completion([step["id"] for step in steps], top, answer["usage"]["prompt_tokens"])


def compare(model: PreTrainedModel, path: Path, prompt: list[int] | None = None) -> tuple[float, bool]:
    """Largest difference of the ten top log-probabilities over eight greedy steps; whether the tokens are the same."""
    prompt = prompt or torch.randint(3, 300, (11,), generator=torch.Generator().manual_seed(1)).tolist()
    found = LlamaCpp(path).complete(prompt)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + found.ids[:-1]])).logits[0, len(prompt) - 1 :]
    expected = logits.double().log_softmax(-1)
    worst = max(
        abs(value - expected[i, token].item()) for i, top in enumerate(found.top) for token, value in top.items()
    )
    expected[:, 1] = -torch.inf  # the end of the text, which llama.cpp was asked to pass over
    return worst, expected.argmax(-1).tolist() == found.ids
