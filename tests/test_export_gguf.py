"""GGUF files: llama.cpp itself computes what transformers does, splits texts as the tokenizer does, or we refuse."""

from __future__ import annotations

import json
import string

import numpy as np
import pytest
import torch
from served import KEPT, WORDS, LlamaCpp, byte_tokenizer, compare, save, tiny_served_model
from test_export_plain import saved

import hf_prune
from hf_prune.errors import ConfigError, HFPruneError, StructureError
from hf_prune.exporting import gguf as module
from hf_prune.exporting.tokenizer import tokenizer_values

pytest.importorskip("xllamacpp")

_ROPE = {
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


def check(tmp_path, model, architecture, **arguments):
    path = save(tmp_path / "pruned", model)
    written = hf_prune.export(path, tmp_path / "model.gguf", format="gguf", **arguments)
    assert written.architecture == architecture
    assert written.num_parameters == model.num_parameters()
    worst, same = compare(model, written.path)
    assert worst < 1e-3
    assert same
    return written


def read(path):
    from gguf import GGUFReader

    reader = GGUFReader(path)
    return {tensor.name: tensor for tensor in reader.tensors}, reader.fields


@pytest.mark.parametrize("kept", KEPT)
def test_llama(kept, tmp_path):
    written = check(tmp_path, tiny_served_model("llama", kept), "llama" if kept in ("dense", "uniform") else "deci")
    if kept == "no mlp":  # a width of 0 would take the attention with it
        tensors, _ = read(written.path)
        assert list(tensors["blk.0.ffn_gate.weight"].shape) == [48, 32]
        assert not tensors["blk.0.ffn_gate.weight"].data.any()


@pytest.mark.parametrize(
    ("family", "kept", "architecture", "settings"),
    [
        ("llama_tied", "different", "deci", {"num_key_value_heads": 3}),
        ("llama_tied", "no mlp", "deci", {"num_key_value_heads": 3}),
        ("llama", "different", "deci", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", "different", "deci", {"sliding_window": None}),
        ("mistral", "uniform", "llama", {"sliding_window": None}),
        ("qwen2", "different", "deci", {}),
        ("qwen2", "no attention", "deci", {}),
        ("qwen2", "uniform", "deci", {}),
        ("qwen2", "dense", "qwen2", {"head_dim": 6}),
        ("qwen3", "different", "openelm", {"tie_word_embeddings": True}),
        ("qwen3", "no attention", "openelm", {"tie_word_embeddings": True}),
        ("qwen3", "hidden", "openelm", {"tie_word_embeddings": True}),
        ("qwen3", "uniform", "qwen3", {"tie_word_embeddings": False}),
        ("qwen3", "different", "qwen3", {"tie_word_embeddings": False}),
    ],
)
def test_families(family, kept, architecture, settings, tmp_path):
    check(tmp_path, tiny_served_model(family, kept, **settings), architecture)


@pytest.mark.parametrize(
    ("kind", "family", "architecture"),
    [("llama3", "llama", "deci"), ("yarn", "qwen2", "deci"), ("linear", "llama", "deci"), ("yarn", "qwen3", "openelm")],
)
def test_rotary_scaling(kind, family, architecture, tmp_path):
    parameters = {"rope_type": kind, "rope_theta": 10000.0, **_ROPE[kind]}
    tied = {"tie_word_embeddings": True} if family == "qwen3" else {}
    check(tmp_path, tiny_served_model(family, "different", rope_parameters=parameters, **tied), architecture)


def test_first_layer_without_attention(tmp_path, monkeypatch):
    """Whose number of heads llama.cpp takes for the model's: it gets one group of zeros."""
    monkeypatch.setitem(KEPT, "no first attention", {"layers.attention": (1, 2)})
    model = tiny_served_model("llama", "no first attention")
    written = check(tmp_path, model, "deci")
    assert written.num_exported > written.num_parameters


def test_zero_channels_of_the_residual_stream_change_nothing(tmp_path, monkeypatch):
    """18 hidden channels are written as 32, MLP widths as multiples of 32; float32 shows that it is exact."""
    from gguf import GGMLQuantizationType

    monkeypatch.setattr(module, "_type", lambda entry, dtype: GGMLQuantizationType.F32)
    written = check(tmp_path, tiny_served_model("llama", "hidden", rms_norm_eps=0.1), "deci", dtype="q8_0")
    tensors, _ = read(written.path)
    assert list(tensors["blk.1.ffn_down.weight"].shape) == [32, 32]
    assert any("14 hidden channels of zeros" in note for note in written.notes)


@pytest.mark.parametrize(("dtype", "step"), [("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 2**-7), ("q4_0", 2**-3)])
def test_dtypes(dtype, step, tmp_path):
    from gguf import dequantize

    model = tiny_served_model("llama", "different", head_dim=32)
    path = save(tmp_path / "pruned", model)
    written = hf_prune.export(path, tmp_path / "model.gguf", format="gguf", dtype=dtype)
    tensors, _ = read(written.path)
    kinds = {name: tensor.tensor_type.name.lower() for name, tensor in tensors.items()}
    assert kinds["blk.1.ffn_down.weight"] == dtype
    assert kinds["token_embd.weight"] == ("q8_0" if dtype == "q4_0" else dtype)
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"f32"}
    found = tensors["blk.0.ffn_up.weight"]
    values = dequantize(found.data, found.tensor_type).reshape(tuple(reversed(found.shape.tolist())))
    weight = model.model.layers[0].mlp.up_proj.weight.detach().numpy()
    assert np.abs(values[:17, :48] - weight).max() <= step * np.abs(weight).max()
    assert not values[17:].any()
    LlamaCpp(written.path).complete([5, 6, 7])


def test_widths_can_be_rounded_for_a_later_quantisation(tmp_path):
    path = save(tmp_path / "pruned", tiny_served_model("llama", "different"))
    written = hf_prune.export(path, tmp_path / "model.gguf", format="gguf", round_to=256)
    tensors, _ = read(written.path)
    assert [int(tensors[f"blk.{i}.ffn_down.weight"].shape[0]) for i in range(3)] == [256] * 3
    assert written.num_exported > written.num_parameters
    assert compare(tiny_served_model("llama", "different"), written.path)[0] < 1e-3


def test_a_sliding_window_bounds_the_context(tmp_path):
    written = check(tmp_path, tiny_served_model("mistral", "different", sliding_window=40), "deci")
    _, fields = read(written.path)
    assert fields["deci.context_length"].contents() == 40
    assert any("sliding window" in note for note in written.notes)


# --- tokenizers -------------------------------------------------------------------------------------------------------

_TEXTS = (
    "he walked 12345 miles, wasn't it?\n\n  Slowly   SHE'S\tthere! ",
    "  (the old-house)...\r\n\r\n 1.5e10 x_y The light",
    "camelCaseRIVERs: a/\n\nb 98765 12345",
)
_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(pre_tokenizer, *, bos=False, **model):
    """A byte-level tokenizer that splits texts as told; it has learned merges across splits, so that they matter."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(**model))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=316, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([*_TEXTS * 3, "12 123 1234 THE !! \n\n"], trainer)
    raw.pre_tokenizer = pre_tokenizer
    raw.add_tokens(["<house>"])
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


def split(regex):
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def sentencepiece_like(prefix=True):
    """Pieces with every merge that SentencePiece would find, and byte fallback, as transformers makes of a Llama 2."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["th", "he", "the", "▁the", "▁w", "al", "wal", "▁wal", "ke", "ked", "▁walked", "ou", "▁h", "ouse", "se"]
    letters = [*string.ascii_lowercase, *"▁SHET125,.'?!()-"]
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters]
    vocab = {text: i for i, text in enumerate([*texts, *pieces])}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    raw = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if prefix else "never", split=False)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def tokenizers():
    from tokenizers import pre_tokenizers as pre

    level = pre.ByteLevel(add_prefix_space=False)
    return {
        "gpt-2": trained(level),
        "gpt-2 with bos": trained(level, bos=True),
        "smollm": trained(pre.Sequence([pre.Digits(individual_digits=True), level])),
        "qwen2": trained(split(_WORD + r"\p{N}" + _REST)),
        "llama-bpe": trained(split(_WORD + r"\p{N}{1,3}" + _REST), bos=True, ignore_merges=True),
        "tekken": trained(split(_TEKKEN), ignore_merges=True),
        "pieces": sentencepiece_like(),
        "pieces without prefix": sentencepiece_like(prefix=False),
    }


@pytest.mark.parametrize("name", tokenizers())
def test_llama_cpp_splits_texts_as_the_tokenizer_does(name, tmp_path):
    """The same log-probabilities for a text as for its token ids: a random model tells other ids apart."""
    tokenizer = tokenizers()[name]
    model = tiny_served_model("llama", max_position_embeddings=256)
    with torch.no_grad():  # llama.cpp does not tell the log-probabilities of parts of characters: not likely ones here
        texts = [tokenizer.decode([i]).strip() for i in range(320)]
        shown = [text.isascii() and text.isprintable() and text[:1] not in ("", "<") for text in texts]
        model.lm_head.weight[~torch.tensor(shown)] = 0
    path = save(tmp_path / "dense", model, tokenizer)
    hf_prune.export(path, tmp_path / "model.gguf", format="gguf", dtype="f32")
    llama_cpp = LlamaCpp(tmp_path / "model.gguf", num_tokens=256)
    for text in (*_TEXTS, f"{WORDS[0]}<house> \u00e9t\u00e9 \u4f60 \U0001f600"):
        if name == "pieces":  # before a space transformers puts no other one, unlike SentencePiece and llama.cpp
            text = text.lstrip()
        ids = tokenizer(text)["input_ids"]
        by_text, by_ids = (llama_cpp.complete(prompt, 1) for prompt in (text, ids))
        assert by_text.num_prompt_tokens == len(ids)
        assert by_text.top[0] == pytest.approx(by_ids.top[0], abs=1e-4)


def test_the_chat_template_travels(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    path = save(tmp_path / "dense", tiny_served_model("llama"), tokenizer)
    hf_prune.export(path, tmp_path / "model.gguf", format="gguf")
    assert read(tmp_path / "model.gguf")[1]["tokenizer.chat_template"].contents() == tokenizer.chat_template


def test_other_tokenizers_are_refused(tmp_path):
    from tokenizers import normalizers, pre_tokenizers

    config = tiny_served_model("llama").config
    lower = byte_tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    words = byte_tokenizer()
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    half = sentencepiece_like()
    content = json.loads(half.backend_tokenizer.to_str())
    content["model"]["merges"] = [pair for pair in content["model"]["merges"] if pair != ["t", "he"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    from transformers import PreTrainedTokenizerFast

    incomplete = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for tokenizer, reason in ((lower, "normalizer"), (words, "Whitespace"), (incomplete, "no merge of")):
        with pytest.raises(ConfigError, match=rf"tokenizer: .*{reason}.*other token ids"):
            tokenizer_values(tokenizer, config, 320)
    with pytest.raises(ConfigError, match="rows of the embedding"):
        tokenizer_values(byte_tokenizer(), config, 100)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "settings", "error", "reason"),
    [
        ("gemma3_text", {}, ConfigError, "found a gemma3_text model, GGUF export knows llama, mistral, qwen2, qwen3"),
        ("llama", {"hidden_act": "gelu"}, ConfigError, "hidden_act: found 'gelu'"),
        ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}, StructureError, "q_proj.bias"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            ConfigError,
            "rope_parameters: found 'dynamic'",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            ConfigError,
            "rope_parameters: found {'partial_rotary_factor': 0.5}",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, **_ROPE["yarn"], "truncate": False}},
            ConfigError,
            "rope_parameters: found {'truncate': False}",
        ),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(family, settings, error, reason, tmp_path):
    path = save(tmp_path / "pruned", tiny_served_model(family, "different", **settings))
    with pytest.raises(error, match=reason):
        hf_prune.export(path, tmp_path / "new" / "model.gguf", format="gguf")
    assert [entry.name for entry in tmp_path.iterdir()] == ["pruned"]


def test_bad_arguments(tmp_path, monkeypatch):
    path, _ = saved(tmp_path, "llama", {"layers.0.mlp": (1, 2)})
    with pytest.raises(ConfigError, match="dtype: found 'q4_k_m', expected one of"):
        hf_prune.export(path, tmp_path / "model.gguf", format="gguf", dtype="q4_k_m")
    with pytest.raises(HFPruneError, match="no tokenizer could be loaded"):
        hf_prune.export(path, tmp_path / "model.gguf", format="gguf")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"pip install 'hf_prune\[gguf\]'"):
        hf_prune.export(path, tmp_path / "model.gguf", format="gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    path = save(tmp_path / "pruned", tiny_served_model("llama", "different"))

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "read_weight", fail)
    with pytest.raises(HFPruneError, match="could not be written"):
        hf_prune.export(path, tmp_path / "model.gguf", format="gguf")
    assert [entry.name for entry in tmp_path.iterdir()] == ["pruned"]
    assert torch.is_grad_enabled()
