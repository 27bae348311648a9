"""The tokenizer of a GGUF file, from a fast tokenizer of transformers: the same token ids, or an error."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from hf_prune.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

_GPT2 = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
_REST = " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
_WORDS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
_UPPER, _LOWER = "\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}", "\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}"
_TEKKEN = (
    f"[^\\r\\n\\p{{L}}\\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\\r\\n\\p{{L}}\\p{{N}}]?[{_UPPER}]+[{_LOWER}]*|"
    "\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
# How a text is split before its parts are merged, and whether whole words are looked up first → llama.cpp's name of it.
_SPLITS: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    (("\\p{N}", _GPT2), False): "smollm",
    ((f"{_WORDS}\\p{{N}}|{_REST}",), False): "qwen2",
    ((f"{_WORDS}\\p{{N}}{{1,3}}|{_REST}",), True): "llama-bpe",
    ((_TEKKEN,), True): "tekken",
}
_NORMAL, _, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # token types of llama.cpp
_NEVER = -1e6  # score of what no merge makes


def tokenizer_values(tokenizer: PreTrainedTokenizerBase, config: Any, vocab_size: int) -> dict[str, Any]:
    """What a GGUF file says of a tokenizer.

    Args:
        tokenizer: a fast tokenizer: byte-level BPE, or BPE of SentencePiece pieces with byte fallback.
        config: of the model: its special token ids count where the tokenizer has none.
        vocab_size: rows of the embedding.

    Returns:
        Values by the method of `GGUFWriter` that adds them, without `add_`.

    Raises:
        ConfigError: llama.cpp would split texts in another way.
    """
    raw = getattr(tokenizer, "backend_tokenizer", None)
    if raw is None:
        raise _refused(f"found {type(tokenizer).__name__}, expected one with a tokenizer.json")
    content = json.loads(raw.to_str())
    model, added = content["model"], {entry["id"]: entry for entry in content["added_tokens"]}
    if model["type"] != "BPE":
        raise _refused(f"found a {model['type']} tokenizer, expected BPE")
    texts = {index: text for text, index in model["vocab"].items()} | {i: e["content"] for i, e in added.items()}
    if max(texts) >= vocab_size:
        raise _refused(f"found token {max(texts)}, expected less than the {vocab_size} rows of the embedding")
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    pieces = bool(model.get("byte_fallback"))
    types = []
    for index in range(vocab_size):
        text = texts.get(index)
        if index in added:
            types.append(_CONTROL if added[index]["special"] else _USER_DEFINED)
        elif pieces and re.fullmatch("<0x[0-9A-F]{2}>", text or ""):
            types.append(_BYTE)
        else:
            types.append(_UNUSED if text is None else _NORMAL)
    values: dict[str, Any] = {
        "token_list": [texts.get(index, f"[PAD{index}]") for index in range(vocab_size)],
        "token_types": types,
    }
    if pieces:
        scores = _scores(model["vocab"], merges)
        values |= {"tokenizer_model": "llama", "tokenizer_pre": "default", "add_space_prefix": _space_prefix(content)}
        values["token_scores"] = [scores.get(index, _NEVER) for index in range(vocab_size)]
    else:
        values |= {"tokenizer_model": "gpt2", "tokenizer_pre": _split(content)}
        values["token_merges"] = [" ".join(pair) for pair in merges]
    ids = tokenizer("a")["input_ids"]
    for name, place in (("bos", 0), ("eos", -1), ("unk", None), ("pad", None)):
        found = getattr(tokenizer, f"{name}_token_id", None)
        found = getattr(config, f"{name}_token_id", None) if found is None else found
        if isinstance(found, list):
            found = found[0]
        if found is not None:
            values[f"{name}_token_id"] = found
        if place is not None:
            values[f"add_{name}_token"] = found is not None and ids[place] == found
    template = getattr(tokenizer, "chat_template", None)
    template = template.get("default") if isinstance(template, dict) else template
    return values if template is None else {**values, "chat_template": template}


def _refused(reason: str) -> ConfigError:
    return ConfigError(f"tokenizer: {reason}: llama.cpp would give other token ids. Export as plain instead.")


def _parts(step: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, sequences taken apart."""
    if step is not None and step["type"] == "Sequence":
        for inner in step.get("pretokenizers", step.get("normalizers", ())):
            yield from _parts(inner)
    elif step is not None:
        yield step


def _split(content: dict[str, Any]) -> str:
    """llama.cpp's name for the way a byte-level tokenizer splits texts."""
    found = []
    for step in _parts(content["pre_tokenizer"]):
        if step["type"] == "Digits" and step["individual_digits"]:
            found.append("\\p{N}")
        elif step["type"] == "Split" and not step["invert"] and step["behavior"] == "Isolated":
            found.append(step["pattern"].get("Regex"))
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            found += [_GPT2] if step["use_regex"] else []
        else:
            raise _refused(f"found the pre-tokenizer {step['type']}, expected Digits, Split or ByteLevel")
    if any(step["type"] != "NFC" for step in _parts(content["normalizer"])):  # llama.cpp takes texts to be NFC
        raise _refused("found a normalizer")
    name = _SPLITS.get((tuple(found), bool(content["model"].get("ignore_merges"))))
    if name is None:
        known = ", ".join(_SPLITS.values())
        raise _refused(f"found a way of splitting texts {found}, expected that of {known}")
    return name


def _space_prefix(content: dict[str, Any]) -> bool:
    """Whether a tokenizer of pieces puts a space before a text; besides, it may turn spaces into ▁."""
    prefix = False
    for step in [*_parts(content["normalizer"]), *_parts(content["pre_tokenizer"])]:
        if step["type"] == "Prepend" and step["prepend"] == "▁":
            prefix = True
        elif step["type"] == "Metaspace" and step["replacement"] == "▁" and not step["split"]:
            prefix = prefix or step["prepend_scheme"] != "never"
        elif not (step["type"] == "Replace" and (step["pattern"], step["content"]) == ({"String": " "}, "▁")):
            raise _refused(f"found the step {step['type']}, expected spaces to become ▁ and nothing else")
    return prefix


def _scores(vocab: dict[str, int], merges: list[tuple[str, ...]]) -> dict[int, float]:
    """Scores of pieces such that joining the best pair of pieces first, as SentencePiece does, is what `merges` do."""
    scores: dict[int, float] = {}
    last, known = "", set(merges)
    for rank, (left, right) in enumerate(merges):
        piece = left + right
        if scores.setdefault(vocab[piece], -float(rank)) != -float(rank) and piece != last:
            raise _refused(f"found merges to {piece!r} at several places, expected them one after another")
        last = piece
    for piece in vocab:
        for cut in range(1, len(piece)):
            pair = piece[:cut], piece[cut:]
            if pair not in known and pair[0] in vocab and pair[1] in vocab:
                raise _refused(f"found no merge of {pair}, which SentencePiece would join to {piece!r}")
    return scores
