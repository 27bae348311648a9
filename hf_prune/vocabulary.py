"""The vocabulary: which tokens texts need, and a tokenizer that has only those.

Byte-level BPE alone (GPT-2, Llama 3, Qwen): its byte tokens spell any text, whatever else goes. A token is made by
merges, and stays with the tokens that they join on the way: texts whose tokens all stay are then cut as before.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError
from tokenizers import Tokenizer, pre_tokenizers

from hf_prune.calibration import Sources, asks_model, is_text, parts_of, text_of
from hf_prune.config.checks import Range
from hf_prune.data import pieces, token_stream
from hf_prune.errors import ConfigError
from hf_prune.surgery.tokens import token_ids

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Vocabulary = Sources | Sequence[int]
"""Texts whose tokens stay, as for calibration; or the ids of the tokens themselves."""


def kept_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary, *, coverage: float = 1.0
) -> tuple[int, ...]:
    """The tokens that stay, for texts or of a list.

    Of texts: all tokens in them, or the most frequent ones. To both are added the tokens that merges need on the way to
    these; to those of texts also the byte tokens, the added ones (special tokens), those that the config or the
    generation config names, and what the chat template writes.

    Args:
        model: with or without weights; its configs and the size of its embedding count.
        tokenizer: the model's own.
        vocabulary: texts, or ids.
        coverage: share of the tokens of each text that are to stay what they are, the most frequent first; above 0, up
            to 1. The others are spelled in shorter tokens.

    Returns:
        Ascending ids.

    Raises:
        ConfigError: a tokenizer of another kind, a list that lacks what must stay or holds other ids than the
            tokenizer's, or `coverage` out of range.
        CalibrationError: a text that cannot be read.
    """
    content = _content(tokenizer)
    if not Range(0, 1, "(]").holds(coverage):
        raise ConfigError(f"coverage: found {coverage!r}, expected a number above 0 and up to 1.")
    embedding: Any = model.get_input_embeddings()
    rows, texts = len(embedding.weight), _texts(content)
    if beyond := sorted(token for token in texts if token >= rows):
        raise ConfigError(
            f"the tokenizer has {len(beyond)} tokens, such as {texts[beyond[-1]]!r}, beyond the {rows} rows of the "
            "embedding: pass the tokenizer of this model."
        )
    needed = _must_stay(content)
    for config in (model.config, model.generation_config):
        needed |= texts.keys() & (token_ids(config.to_dict(), rows) if config is not None else set())
    if is_text(vocabulary):
        if asks_model(vocabulary):  # type: ignore[arg-type]
            raise ConfigError("vocabulary: found 'self', but a model may say any token; expected texts, or token ids.")
        found = needed if tokenizer.chat_template is None else needed | _of_template(tokenizer)
        for part in parts_of(vocabulary):  # type: ignore[arg-type]
            found |= _frequent(_counts(tokenizer, text_of(part.source, tokenizer), rows), coverage)
    else:
        found = _checked(vocabulary, texts, needed)  # type: ignore[arg-type]
    return tuple(sorted(_closed(content, found)))


def prune_tokenizer(tokenizer: PreTrainedTokenizerBase, kept: Sequence[int]) -> PreTrainedTokenizerBase:
    """A tokenizer of only the tokens `kept`, numbered anew in that order; the one that is given is not changed.

    Merges whose parts and result stay, stay. A text all of whose tokens stay is cut as before, any other in shorter
    pieces, at worst bytes. Special tokens, chat template and settings are what they were.

    Args:
        tokenizer: a fast one, of byte-level BPE.
        kept: ascending ids: of `kept_tokens`, or `plan.kept_indices["vocab"]`.

    Raises:
        ConfigError: a tokenizer of another kind, or bytes, added tokens or parts of a token are missing in `kept`.
    """
    content = _content(tokenizer)
    texts, must = _texts(content), _must_stay(content)
    if missing := sorted(_closed(content, _checked(kept, texts, must)) - set(kept)):
        raise ConfigError(
            f"the list lacks {len(missing)} tokens that merges need on the way to others, such as "
            f"{texts[missing[0]]!r}: take the ids that `kept_tokens` returns."
        )
    new = {old: number for number, old in enumerate(sorted(kept))}
    model = content["model"]
    vocab = {text: new[old] for text, old in model["vocab"].items() if old in new}
    model["vocab"] = vocab
    model["merges"] = [pair for pair in _merges(model) if all(x in vocab for x in (*pair, "".join(pair)))]
    for added in content["added_tokens"]:
        added["id"] = new[added["id"]]
    if content.get("padding"):
        content["padding"]["pad_id"] = new[content["padding"]["pad_id"]]
    content["post_processor"] = _renumbered(content["post_processor"], new)
    pruned: Any = copy.deepcopy(tokenizer)
    pruned._tokenizer = Tokenizer.from_str(json.dumps(content))
    for old, number in new.items():
        if pruned.convert_ids_to_tokens(number) != tokenizer.convert_ids_to_tokens(old):
            raise ConfigError(
                f"the tokenizer gives token {texts[old]!r} another number than its place among those that stay: its "
                "added tokens do not follow its other tokens without a gap. Its vocabulary cannot be pruned."
            )
    return pruned  # type: ignore[no-any-return]


def spelled(tokenizer: PreTrainedTokenizerBase, pruned: PreTrainedTokenizerBase, ids: Tensor) -> Tensor:
    """A text of token ids `[tokens]` in those of the pruned tokenizer, int64; a token that is gone in several pieces.

    Each token keeps its place: where pieces of two tokens would merge, the pruned tokenizer itself may take fewer.
    """
    model, backend = pruned.backend_tokenizer.model, pruned.get_vocab()
    texts = tokenizer.convert_ids_to_tokens(ids.tolist())
    found = [[backend[text]] if text in backend else [piece.id for piece in model.tokenize(text)] for text in texts]
    return torch.tensor(list(itertools.chain(*found)), dtype=torch.int64)


# --- what must stay ---------------------------------------------------------------------------------------------------


def _content(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What tokenizer.json says; `ConfigError` unless it is byte-level BPE."""
    raw = getattr(tokenizer, "backend_tokenizer", None)
    if raw is None:
        raise _refused(f"found {type(tokenizer).__name__}, which has no tokenizer.json")
    content: dict[str, Any] = json.loads(raw.to_str())
    model, name = content["model"], type(tokenizer).__name__
    if model["type"] != "BPE":
        raise _refused(f"found a {model['type']} tokenizer ({name})")
    if model.get("byte_fallback"):
        raise _refused(f"found BPE of SentencePiece pieces with byte fallback ({name})")
    affixes = [key for key in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if affixes or '"ByteLevel"' not in json.dumps(content["pre_tokenizer"]):
        raise _refused(f"found BPE of characters ({', '.join([name, *affixes])})")
    return content


def _refused(reason: str) -> ConfigError:
    return ConfigError(
        f"tokenizer: {reason}, expected byte-level BPE, as of GPT-2, Llama 3 and Qwen: the vocabulary of others cannot "
        "be pruned. Leave out `vocabulary`."
    )


def _texts(content: Mapping[str, Any]) -> dict[int, str]:
    added = {entry["id"]: entry["content"] for entry in content["added_tokens"]}
    return {token: text for text, token in content["model"]["vocab"].items()} | added


def _must_stay(content: Mapping[str, Any]) -> set[int]:
    """Added tokens, and the bytes that there are: some tokenizers lack those that they have seen no text with."""
    vocab, unknown = content["model"]["vocab"], content["model"].get("unk_token")
    single = {vocab[text] for text in (*pre_tokenizers.ByteLevel.alphabet(), unknown) if text in vocab}
    return single | {entry["id"] for entry in content["added_tokens"]}


def _of_template(tokenizer: Any) -> set[int]:
    """What the chat template writes by itself."""
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    with contextlib.suppress(TemplateError, TypeError, KeyError):  # it wants other roles
        return set(token_stream(tokenizer, tokenizer.apply_chat_template(turns, tokenize=False)).tolist())
    return set()


def _checked(tokens: Iterable[Any], texts: Mapping[int, str], must: set[int]) -> set[int]:
    """A list of tokens as a set; `ConfigError` if it has others than `texts`, or lacks some that must stay."""
    found = list(tokens)
    wrong = [token for token in found if type(token) is not int or token not in texts]
    if wrong or not found:
        raise ConfigError(
            f"vocabulary: found {len(wrong)} entries that are no token ids, such as {wrong[0]!r}, expected ids of the "
            f"tokenizer, from 0 to {max(texts)}."
            if wrong
            else "vocabulary: found an empty list of tokens."
        )
    if missing := sorted(must - set(found)):
        raise ConfigError(
            f"vocabulary: the list of tokens lacks {len(missing)} that must stay (bytes, special and added tokens, and "
            f"those that configs name), such as {texts[missing[0]]!r} ({missing[0]}). Add them, or give a text."
        )
    return set(found)


# --- what texts need --------------------------------------------------------------------------------------------------


def _counts(tokenizer: PreTrainedTokenizerBase, text: str, rows: int) -> Tensor:
    """How often each token is in a text, int64 `[rows]`."""
    return sum(
        (torch.bincount(token_stream(tokenizer, piece), minlength=rows) for piece in pieces(text)),
        torch.zeros(rows, dtype=torch.int64),
    )


def _frequent(counts: Tensor, coverage: float) -> set[int]:
    """The most frequent tokens, until they are this share of the text."""
    found, order = counts.sort(descending=True, stable=True)
    before = found.cumsum(0) - found
    return set(order[(found > 0) & (before < coverage * found.sum())].tolist())


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]


def _closed(content: Mapping[str, Any], tokens: set[int]) -> set[int]:
    """`tokens`, and all tokens that merges make on the way from bytes to them."""
    vocab, added = content["model"]["vocab"], {entry["id"] for entry in content["added_tokens"]}
    ranks = {pair: rank for rank, pair in enumerate(_merges(content["model"]))}
    closed = set(tokens)
    for text in (text for text, token in vocab.items() if token in tokens and token not in added):
        parts = list(text)
        while len(parts) > 1:
            rank, place = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(itertools.pairwise(parts)))
            if rank == len(ranks):
                break  # no merges make it: it is only found as a whole word
            parts[place : place + 2] = ["".join(parts[place : place + 2])]
            closed.add(vocab[parts[place]])
    return closed


def _renumbered(step: Any, new: Mapping[int, int]) -> Any:
    """A post-processor with the new ids of its special tokens."""
    if isinstance(step, dict):
        return {
            key: [new[token] for token in value] if key == "ids" else _renumbered(value, new)
            for key, value in step.items()
        }
    if isinstance(step, list):
        if len(step) == 2 and isinstance(step[0], str) and type(step[1]) is int:  # ("</s>", 2) of Roberta and Bert
            return [step[0], new[step[1]]]
        return [_renumbered(inner, new) for inner in step]
    return step
