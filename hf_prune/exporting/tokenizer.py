"""The tokenizer of a GGUF file, from a fast tokenizer of transformers: the same token ids, or an error."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
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
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # token types of llama.cpp


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer."""

    model: str
    """`gpt2`: merges of bytes; `llama`: pieces with scores, as SentencePiece has them."""
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    special: dict[str, int]
    """`bos`, `eos`, `unk`, `pad` → token id."""
    adds: dict[str, bool]
    """Whether `bos` and `eos` are put around a text; `space_prefix`: a space before it."""
    chat_template: str | None

    def write(self, writer: Any) -> None:
        """Add it to a `GGUFWriter`."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
        if self.merges:
            writer.add_token_merges(self.merges)
        for name, token in self.special.items():
            getattr(writer, f"add_{name}_token_id")(token)
        writer.add_add_bos_token(self.adds["bos"])
        writer.add_add_eos_token(self.adds["eos"])
        writer.add_add_space_prefix(self.adds["space_prefix"])
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def vocabulary(tokenizer: PreTrainedTokenizerBase, config: Any, vocab_size: int) -> Vocabulary:
    """Read a tokenizer for llama.cpp.

    Args:
        tokenizer: a fast tokenizer: byte-level BPE, or BPE of SentencePiece pieces with byte fallback.
        config: of the model: its special token ids count where the tokenizer has none.
        vocab_size: rows of the embedding.

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
    scores: dict[int, float] = {}
    space_prefix = False
    if pieces := bool(model.get("byte_fallback")):
        space_prefix = _space_prefix(content)
        scores = _scores(model["vocab"], merges)
        pre = "default"
    else:
        pre = _split(content)
    types = []
    for index in range(vocab_size):
        kind = _NORMAL if index in texts else _UNUSED
        if index in added:
            kind = _CONTROL if added[index]["special"] else _USER_DEFINED
        elif pieces and re.fullmatch("<0x[0-9A-F]{2}>", texts.get(index, "")):
            kind = _BYTE
        types.append(_UNKNOWN if pieces and texts.get(index) == model.get("unk_token") else kind)
    special = {name: _token_id(tokenizer, config, name) for name in ("bos", "eos", "unk", "pad")}
    one = tokenizer("a")["input_ids"]
    template = getattr(tokenizer, "chat_template", None)
    return Vocabulary(
        model="llama" if pieces else "gpt2",
        pre=pre,
        tokens=[texts.get(index, f"[PAD{index}]") for index in range(vocab_size)],
        types=types,
        scores=[scores.get(index, -1e6) for index in range(vocab_size)] if pieces else [],
        merges=[] if pieces else [" ".join(pair) for pair in merges],
        special={name: token for name, token in special.items() if token is not None},
        adds={
            "bos": special["bos"] is not None and one[0] == special["bos"],
            "eos": special["eos"] is not None and one[-1] == special["eos"],
            "space_prefix": space_prefix,
        },
        chat_template=template.get("default") if isinstance(template, dict) else template,
    )


def _refused(reason: str) -> ConfigError:
    return ConfigError(f"tokenizer: {reason}: llama.cpp would give other token ids. Export as plain instead.")


def _token_id(tokenizer: Any, config: Any, name: str) -> int | None:
    found = getattr(tokenizer, f"{name}_token_id", None)
    found = getattr(config, f"{name}_token_id", None) if found is None else found
    return found[0] if isinstance(found, list) else found


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
    """Whether a tokenizer of SentencePiece pieces puts a space before a text, and does nothing else to it."""
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
