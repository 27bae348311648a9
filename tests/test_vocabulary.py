"""Tokens that no text needs go: the others have the dense logits, texts the same pieces, and any text round-trips."""

import functools
import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import logits, random_kept, shared_model, shared_structure, tiny_config, tiny_model
from served import WORDS, tiny_served_model
from test_export_gguf import tokenizers
from typer.testing import CliRunner

from hf_prune import (
    PruningConfig,
    PruningPlan,
    RandomConfig,
    WandaConfig,
    apply_plan,
    infer_structure,
    kept_tokens,
    prune,
    prune_tokenizer,
)
from hf_prune.checkpoint.saving import load_plan, save_pruned
from hf_prune.errors import CheckpointError, ConfigError, PlanError, StructureError
from hf_prune.plan import bare_plan, with_tokens
from hf_prune.surgery.in_place import apply_plan_
from hf_prune.surgery.pruning import PrunedLayers
from hf_prune.vocabulary import spelled

KINDS = ("gpt-2", "smollm", "qwen2", "llama-bpe")
TEXT = " ".join(random.Random(7).choices(WORDS, k=900)) + "\n"


@functools.cache
def tokenizer(kind="llama-bpe"):
    from tokenizers import decoders

    found = tokenizers()[kind]
    if kind == "llama-bpe":
        found.backend_tokenizer.model = _with_all_merges(found)
        found.chat_template = "{% for m in messages %}<house>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    found.backend_tokenizer.decoder = decoders.ByteLevel()
    return found


def _with_all_merges(found):
    """As what is converted from tiktoken: a token has a merge for each way to cut it into two tokens."""
    from tokenizers import models

    vocab = json.loads(found.backend_tokenizer.to_str())["model"]["vocab"]
    texts = {token: text for text, token in vocab.items()} | {313: "th", 314: "the"}  # of t and he, or of th and e
    vocab = {text: token for token, text in texts.items()}
    cuts = [(text[:cut], text[cut:]) for text in vocab for cut in range(1, len(text)) if text[0] != "<"]
    merges = [pair for pair in cuts if pair[0] in vocab and pair[1] in vocab]
    merges.sort(key=lambda pair: (vocab["".join(pair)], vocab[pair[0]], vocab[pair[1]]))
    assert len(merges) > len({"".join(pair) for pair in merges})
    return models.BPE(vocab, merges, ignore_merges=True)


def ids(text, kind="llama-bpe"):
    return tokenizer(kind)(text, add_special_tokens=False)["input_ids"]


@functools.cache
def model():
    """A llama of 320 rows, three more than the tokenizer has tokens; `<house>` ends what it generates too."""
    found = tiny_served_model("llama", bos_token_id=0, eos_token_id=1, pad_token_id=2)
    found.generation_config.eos_token_id = [1, 316]
    return found


@functools.cache
def kept_for(kind, seed):
    """Random tokens of a tokenizer, and what these and any tokenizer need."""
    draw = random.Random(seed)
    words = "".join(tokenizer(kind).decode([draw.randrange(2, 316)]) for _ in range(draw.randrange(1, 30)))
    return kept_tokens(model(), tokenizer(kind), ids(words, kind) + _needed(kind))


def _needed(kind):
    """Bytes, added tokens, and those that the model's configs name."""
    return [*range(258), 316]


# --- laws of the tokenizer --------------------------------------------------------------------------------------------

pieces = st.sampled_from([*WORDS, "12345", "SHE'S", " ", "\n\n", "<house>", "漢字", "🤖"])
texts = st.one_of(st.text(max_size=40), st.lists(pieces, max_size=12).map(" ".join))


@pytest.mark.parametrize("kind", KINDS)
@given(text=texts, seed=st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_texts_of_kept_tokens_have_the_same_pieces_and_all_texts_round_trip(kind, text, seed):
    kept = kept_for(kind, seed)
    dense, pruned = ids(text, kind), _pruned(kind, seed)(text, add_special_tokens=False)["input_ids"]
    assert set(pruned) <= set(range(len(kept)))
    assert _pruned(kind, seed).decode(pruned) == tokenizer(kind).decode(dense)
    if set(dense) <= set(kept):
        assert [kept[token] for token in pruned] == dense
    cut = spelled(tokenizer(kind), _pruned(kind, seed), torch.tensor(dense, dtype=torch.int64))
    assert _pruned(kind, seed).decode(cut) == tokenizer(kind).decode(dense)


@functools.cache
def _pruned(kind, seed):
    return prune_tokenizer(tokenizer(kind), kept_for(kind, seed))


@pytest.mark.parametrize("kind", KINDS)
def test_a_pruned_tokenizer_survives_saving(kind, tmp_path):
    from transformers import AutoTokenizer

    dense, pruned, kept = tokenizer(kind), _pruned(kind, 3), kept_for(kind, 3)
    pruned.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<house> the river 12345, SHE'S 漢字\n"
    assert len(loaded) == len(pruned) == len(kept) < len(dense)
    assert loaded(text)["input_ids"] == pruned(text)["input_ids"]
    assert [kept[token] for token in loaded.all_special_ids] == dense.all_special_ids
    assert loaded.convert_tokens_to_ids("<house>") == kept.index(316)
    assert loaded.chat_template == dense.chat_template
    assert len(loaded("a")["input_ids"]) == len(dense("a")["input_ids"])  # with <s> where there was one


def test_coverage_keeps_the_frequent_tokens(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("he\n" * 9 + "high")
    frequent, rare = ids("he")[0], ids("high")[-1]
    assert {frequent, rare} <= set(kept_tokens(model(), tokenizer(), str(text)))
    some = set(kept_tokens(model(), tokenizer(), [str(text)], coverage=0.9))
    assert frequent in some
    assert rare not in some
    assert set(_needed("")) | set(ids("assistant: a\n<house>")) <= some  # what the chat template writes


# --- laws of the model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "gemma3_text", "mixtral"])
def test_kept_tokens_have_the_dense_logits(family):
    structure, draw = shared_structure(family), random.Random(5)
    dense = tiny_model(family, dtype=torch.float32)
    if family == "mixtral":
        dense.set_experts_implementation("eager")  # grouped products want other widths
    kept = tuple(sorted({0, 1, 2, *draw.sample(range(96), 40)}))
    more = random_kept(structure, draw)
    for others in ({}, more):
        plan = bare_plan(structure, {**others, "vocab": kept})
        assert PruningPlan.from_json(plan.to_json()) == plan
        before = apply_plan(dense, structure, bare_plan(structure, others)) if others else dense
        pruned = apply_plan(dense, structure, plan)
        new = torch.randint(len(kept), (2, 9), generator=torch.Generator().manual_seed(0))
        expected = logits(before, torch.tensor(kept)[new])[..., list(kept)]
        assert torch.equal(logits(pruned, new), expected)
        assert torch.equal(logits(PrunedLayers(dense, structure, plan).finish(), new), expected)
        assert pruned.num_parameters() == plan.num_parameters(structure)
        assert pruned.config.vocab_size == len(kept)
    apply_plan_(dense, structure, plan)
    assert torch.equal(logits(dense, new), expected)


def test_ids_in_configs_follow_their_tokens():
    config = tiny_config("llama")
    config.update({"image_token_index": 90, "pad_token_id": -1, "eos_token_id": [5, 40], "sub": {"boi_token_id": 91}})
    dense = type(shared_model("llama"))(config)
    dense.generation_config.suppress_tokens, dense.generation_config.bad_words_ids = [3], [[4, 40], [5]]
    kept = (0, 1, 3, 4, 5, 40, 60, 90, 91)
    structure = infer_structure(dense)
    pruned = apply_plan(dense, structure, bare_plan(structure, {"vocab": kept}))
    found, generation = pruned.config, pruned.generation_config
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (0, [4, 5], -1)
    assert (found.image_token_index, found.sub, found.vocab_size) == (7, {"boi_token_id": 8}, 9)
    assert (generation.suppress_tokens, generation.bad_words_ids) == ([2], [[3, 5], [4]])
    assert dense.config.image_token_index == 90
    with pytest.raises(PlanError, match=r"removes the tokens \[90\], which LlamaConfig names"):
        apply_plan(dense, structure, bare_plan(structure, {"vocab": (*kept[:7], 91)}))
    dense.generation_config.sequence_bias = [[[4], 1.0]]
    with pytest.raises(PlanError, match="sequence_bias names tokens"):
        apply_plan(dense, structure, bare_plan(structure, {"vocab": kept}))


# --- the whole job ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with its tokenizer, the text of `TEXT`, and one of other words."""
    path = tmp_path_factory.mktemp("vocabulary")
    model().save_pretrained(path / "dense")
    tokenizer().save_pretrained(path / "dense")
    (path / "text.txt").write_text(TEXT)
    (path / "words.txt").write_text("the river she walked 12\n\n")
    return path


CONFIG = WandaConfig(0.3, axes=("mlp", "hidden"), repair="end_to_end", num_samples=12, seq_len=16)


@pytest.fixture(scope="module")
def pruned(folder):
    return prune(folder / "dense", CONFIG, calibration=str(folder / "text.txt"), vocabulary=str(folder / "words.txt"))


def test_a_vocabulary_goes_beside_other_axes_and_changes_nothing_of_them(folder, pruned):
    alone = prune(folder / "dense", CONFIG, calibration=str(folder / "text.txt"))
    kept = pruned.plan.kept_indices["vocab"]
    assert pruned.plan.kept_indices == {**alone.plan.kept_indices, "vocab": kept}
    assert pruned.plan.achieved["decoder"] == alone.plan.achieved["decoder"]
    assert pruned.plan.achieved["model"] > alone.plan.achieved["model"]
    assert pruned.model.num_parameters() == pruned.plan.num_parameters(pruned.structure)
    new = torch.arange(len(kept))[None, ::8]
    assert torch.equal(logits(pruned.model, new), logits(alone.model, torch.tensor(kept)[new])[..., list(kept)])
    assert pruned.perplexity_before == alone.perplexity_before
    assert pruned.perplexity_after != alone.perplexity_after
    assert "vocab" not in alone.plan.num_units


def test_perplexity_is_for_each_dense_token(folder):
    """Where every token of the text stays, it is that of the same windows over fewer choices."""
    found = prune(
        folder / "dense", PruningConfig(0), calibration=str(folder / "text.txt"), vocabulary=str(folder / "text.txt")
    )
    assert 0.5 * found.perplexity_before < found.perplexity_after < found.perplexity_before
    assert found.plan.achieved["decoder"] == 0 < found.plan.achieved["model"]


def test_from_disk_it_is_the_same_and_survives_saving_loading_and_generating(folder, pruned, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text, words = str(folder / "text.txt"), str(folder / "words.txt")
    found = prune(folder / "dense", CONFIG, calibration=text, vocabulary=words, layers_on="disk")
    assert found.plan == pruned.plan
    save_pruned(found.model, tmp_path / "out", tokenizer=found.tokenizer)
    loaded, own = (cls.from_pretrained(tmp_path / "out") for cls in (AutoModelForCausalLM, AutoTokenizer))
    assert load_plan(tmp_path / "out") == pruned.plan
    new = torch.tensor([own("the river she walked")["input_ids"]])
    assert torch.equal(logits(loaded, new), logits(pruned.model, new))
    kept = pruned.plan.kept_indices["vocab"]
    assert [kept[token] for token in loaded.generation_config.eos_token_id] == [1, 316]
    assert loaded.generate(new, max_new_tokens=6, do_sample=False, eos_token_id=None).max() < len(kept)
    again = prune(loaded, RandomConfig(0.2), tokenizer=own)
    save_pruned(again.model, tmp_path / "again", tokenizer=own)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").config.vocab_size == len(kept)
    with pytest.raises(CheckpointError, match=r"tokenizer has 317 tokens, the model \d+: its vocabulary was pruned"):
        save_pruned(found.model, tmp_path / "wrong", tokenizer=tokenizer())


def test_a_plan_is_a_value(folder, pruned):
    plan = PruningPlan.from_json(pruned.plan.to_json())
    assert len(json.loads(pruned.plan.to_json())["kept_indices"]["vocab"]) == 56  # 320 bits in base 64
    own = prune_tokenizer(tokenizer(), plan.kept_indices["vocab"])
    assert own("the old house")["input_ids"] == pruned.tokenizer("the old house")["input_ids"]
    unrepaired = apply_plan(model(), infer_structure(model()), plan)
    assert unrepaired.num_parameters() == pruned.model.num_parameters()
    for damaged in ("AAAA", "not base 64", None):
        values = plan.to_dict()
        values["kept_indices"]["vocab"] = damaged
        with pytest.raises(PlanError, match="vocab"):
            PruningPlan.from_dict(values)


def test_recovery_with_the_dense_teacher(folder, pruned, tmp_path):
    from hf_prune import recover

    save_pruned(pruned.model, tmp_path / "pruned", tokenizer=pruned.tokenizer)
    options = {"steps": 2, "seq_len": 16, "learning_rate": 1e-3, "report_to": "none", "use_cpu": True}
    found = recover(
        tmp_path / "pruned", tmp_path / "out", train=str(folder / "text.txt"), teacher=str(folder / "dense"), **options
    )
    assert found.model.config.vocab_size == len(pruned.plan.kept_indices["vocab"])
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_the_command_line(folder, tmp_path):
    from hf_prune.cli.main import app

    kept = kept_tokens(model(), tokenizer(), str(folder / "words.txt"))
    (tmp_path / "ids.json").write_text(json.dumps(kept))
    for source in (folder / "words.txt", tmp_path / "ids.json"):
        out = tmp_path / source.stem
        found = CliRunner().invoke(app, ["prune", str(folder / "dense"), str(out), "--vocabulary", str(source)])
        assert found.exit_code == 0, found.output
        assert load_plan(out).kept_indices == {"vocab": kept}


# --- bad input --------------------------------------------------------------------------------------------------------


def test_what_must_stay_is_asked_for():
    needed = _needed("")
    with pytest.raises(ConfigError, match=r"lacks 1 that must stay .*such as '#' \(4\)"):
        kept_tokens(model(), tokenizer(), [token for token in needed if token != 4])
    with pytest.raises(ConfigError, match=r"lacks 1 that must stay .*'<house>'"):
        prune_tokenizer(tokenizer(), needed[:-1])
    for wrong in ([*needed, 317], [*needed, -1], [*needed, True], [*needed, 1.0]):
        with pytest.raises(ConfigError, match=r"1 entries that are no token ids, .* from 0 to 316"):
            kept_tokens(model(), tokenizer(), wrong)
    with pytest.raises(ConfigError, match="found 'self'"):
        kept_tokens(model(), tokenizer(), "self")
    with pytest.raises(ConfigError, match="empty list"):
        kept_tokens(model(), tokenizer(), [])
    with pytest.raises(ConfigError, match="lacks 1 tokens that merges need on the way"):
        prune_tokenizer(tokenizer(), sorted([*needed, 315]))
    for coverage in (0, 1.1, float("nan"), "1"):
        with pytest.raises(ConfigError, match="coverage: found"):
            kept_tokens(model(), tokenizer(), TEXT, coverage=coverage)
    with pytest.raises(ConfigError, match=r"the tokenizer has 221 tokens, .* beyond the 96 rows"):
        kept_tokens(shared_model("llama"), tokenizer(), needed)
    with pytest.raises(ConfigError, match="found no tokenizer"):
        prune(model(), PruningConfig(0), vocabulary=needed)


@pytest.mark.parametrize("kind", ["pieces", "words", "unigram", "characters"])
def test_other_tokenizers_are_refused_by_name(kind, folder):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    raw = {
        "words": models.WordLevel({"a": 0}, unk_token="a"),
        "unigram": models.Unigram([("a", 0.0)], 0),
        "characters": models.BPE({"a": 0}, []),
    }
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(raw[kind])) if kind in raw else tokenizers()[kind]
    name = {"words": "WordLevel", "unigram": "Unigram", "characters": "of characters", "pieces": "byte fallback"}[kind]
    with pytest.raises(ConfigError, match=f"{name}.*expected byte-level BPE, as of GPT-2, Llama 3 and Qwen"):
        prune(model(), PruningConfig(0), tokenizer=other, vocabulary=str(folder / "words.txt"))


def test_other_tables_of_tokens_are_refused():
    from torch import nn
    from transformers import LlamaForCausalLM

    class TwoTables(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.second = nn.Embedding(60 if config.vocab_size < 90 else 90, config.hidden_size)
            self.post_init()

        def forward(self, input_ids, **kwargs):
            embeds = self.model.embed_tokens(input_ids) + self.second(input_ids)
            return super().forward(inputs_embeds=embeds, **kwargs)

    class TwoHeads(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.next_head = nn.Linear(config.hidden_size, config.vocab_size)
            self.post_init()

    structure = infer_structure(TwoTables(tiny_config("llama")))
    with pytest.raises(PlanError, match=r"stays whole: second\.weight has an entry for each token too"):
        with_tokens(bare_plan(structure, {}), structure, (0, 1, 2))
    structure = shared_structure("llama")
    with pytest.raises(PlanError, match="stays whole: all tokens are needed"):
        with_tokens(bare_plan(structure, {}), structure, tuple(range(96)))
    dense = TwoHeads(tiny_config("llama"))
    structure = infer_structure(dense)
    with pytest.raises(StructureError, match=r"vocabulary cannot be pruned: .*not so next_head"):
        apply_plan(dense, structure, with_tokens(bare_plan(structure, {}), structure, (0, 1, 2, 3)))


def test_it_is_refused_before_work(folder, monkeypatch):
    monkeypatch.setattr("hf_prune.pipeline.decide", lambda *_, **__: pytest.fail("work began"))
    dense = tiny_served_model("llama", bos_token_id=0, eos_token_id=1, pad_token_id=2)
    dense.generation_config.sequence_bias = [[[4], 1.0]]
    with pytest.raises(PlanError, match="sequence_bias names tokens"):
        prune(dense, RandomConfig(0.3), tokenizer=tokenizer(), vocabulary=str(folder / "words.txt"))
