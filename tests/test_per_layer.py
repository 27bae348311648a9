"""The loader of heterogeneous checkpoints, on models pruned by hand: it must agree with the dense model, masked."""

import copy
import importlib.util
import json
import pickle
import sys
import types
from pathlib import Path

import pytest
import torch
from hand_pruned import FAMILIES, HIDDEN, LLAMA, SMALL, hand_pruned, ids, skip_only
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CohereConfig,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    OPTConfig,
    Qwen2Config,
    StaticCache,
)

from hf_prune.errors import CheckpointError
from hf_prune.format import per_layer
from hf_prune.format.stock_guard import make_stock_refuse

per_layer.install()
SOURCE = Path(per_layer.__file__)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("pruned")
    return {family: hand_pruned(family).save(root / family) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def loaded(directories, family):
    return AutoModelForCausalLM.from_pretrained(directories[family]).eval()


def logits(model, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids(), **kwargs).logits


def greedy(model, **kwargs):
    return model.generate(ids(), max_new_tokens=8, do_sample=False, **kwargs)


def reload(model, directory, **kwargs):
    model.save_pretrained(directory, **kwargs)
    return type(model).from_pretrained(directory).eval()


# --- the same function as the masked dense model ----------------------------------------------------------------------


def test_loaded_model_equals_masked_dense_model(loaded, family):
    masked = hand_pruned(family).masked
    assert sum(p.numel() for p in loaded.parameters()) < sum(p.numel() for p in masked.parameters())
    torch.testing.assert_close(logits(loaded), logits(masked), atol=1e-5, rtol=1e-4)
    assert torch.equal(greedy(loaded), greedy(masked))


def test_padded_batch_equals_masked_dense_model(loaded, family):
    """ALiBi is made from the attention mask."""
    mask = torch.ones_like(ids())
    mask[0, :4] = 0
    expected = logits(hand_pruned(family).masked, attention_mask=mask)
    torch.testing.assert_close(logits(loaded, attention_mask=mask)[mask > 0], expected[mask > 0], atol=1e-5, rtol=1e-4)


def test_caches_agree(loaded):
    expected = greedy(loaded, use_cache=False)
    assert torch.equal(greedy(loaded), expected)
    assert torch.equal(greedy(loaded, cache_implementation="static", disable_compile=True), expected)
    beams = greedy(loaded, num_beams=2)
    assert torch.equal(beams, greedy(loaded, num_beams=2, use_cache=False))


def test_attention_implementation_can_change_after_loading(directories, loaded, family):
    eager = AutoModelForCausalLM.from_pretrained(directories[family], attn_implementation="eager").eval()
    before = logits(loaded)
    loaded.set_attn_implementation("eager")
    assert torch.equal(logits(loaded), logits(eager))
    torch.testing.assert_close(logits(loaded), before, atol=1e-5, rtol=1e-4)


def test_copies_are_equal_and_independent(loaded):
    expected = logits(loaded)
    for other in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert torch.equal(logits(other), expected)
        other.config._attn_implementation = "eager"
        layer_configs = {id(m.config): m.config for m in other.modules() if hasattr(m, "config")}.values()
        assert all(config._attn_implementation == "eager" for config in layer_configs)
        for config in layer_configs:
            assert json.loads(config.to_json_string())["model_type"] == loaded.config.model_type
            assert not {"_model_config", "_attn_implementation_internal"} & config.to_dict().keys()
    assert loaded.config._attn_implementation != "eager" or "Bloom" in type(loaded).__name__


def test_config_reload_and_resave(loaded, tmp_path):
    shapes = {name: tensor.shape for name, tensor in loaded.state_dict().items()}
    config = type(loaded.config).from_dict(loaded.config.to_dict())
    assert {name: tensor.shape for name, tensor in type(loaded)(config).state_dict().items()} == shapes
    again = reload(loaded, tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits(again), logits(loaded))
    before, after = (model.config.to_diff_dict() for model in (loaded, again))
    after.pop("auto_map", None)  # which saving a pruned model may add
    assert after == before


def test_built_without_weights_is_initialised_at_its_widths(loaded):
    config = type(loaded.config).from_dict(loaded.config.to_dict())
    torch.manual_seed(0)
    fresh = type(loaded)(config)
    for name, parameter in fresh.named_parameters():
        assert parameter.requires_grad
        assert parameter.shape == loaded.get_parameter(name).shape
        if parameter.dim() == 2:
            assert 0.005 < parameter.std() < 0.05, name
    with torch.device("meta"):
        meta = type(loaded)(config)
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert [p.shape for p in meta.parameters()] == [p.shape for p in fresh.parameters()]


def test_other_heads(directories, loaded, family):
    base = AutoModel.from_pretrained(directories[family]).eval()
    with torch.no_grad():
        hidden = base(ids()).last_hidden_state
        expected = loaded(ids(), output_hidden_states=True).hidden_states[-1]
    assert torch.equal(hidden, expected)
    classifier = AutoModelForSequenceClassification.from_pretrained(directories[family], num_labels=3).eval()
    with torch.no_grad():
        assert classifier(ids()).logits.shape == (2, 3)
    found = {name.split(".", 1)[1]: p.shape for name, p in classifier.named_parameters() if "." in name}
    assert all(found[name] == p.shape for name, p in base.named_parameters())


def test_gradient_checkpointing_gives_the_same_gradients(loaded):
    def gradients():
        loaded.zero_grad()
        loaded(input_ids=ids(), labels=ids()).loss.backward()
        return {name: p.grad.clone() for name, p in loaded.named_parameters() if p.grad is not None}

    assert all(parameter.requires_grad for parameter in loaded.parameters())
    loaded.train()
    expected = gradients()
    getattr(loaded, "activation_checkpointing_enable", loaded.gradient_checkpointing_enable)()  # before 5.22
    found = gradients()
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_torch_compile(loaded):
    torch._dynamo.reset()
    compiled = torch.compile(loaded, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids(), use_cache=False).logits, logits(loaded), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora(loaded, family, directories, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    adapted = get_peft_model(loaded, LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False))
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(directories[family]).eval()
    before = logits(base)
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(logits(again), expected)
    assert not torch.allclose(expected, before, atol=1e-4)
    torch.testing.assert_close(logits(again.merge_and_unload()), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_disk_offload(loaded, family, directories, tmp_path):
    modules = ["model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head"]
    if family == "bloom":
        modules = [f"transformer.{name}" for name in ("word_embeddings", "word_embeddings_layernorm", "h", "ln_f")]
        modules.append("lm_head")
    blocks = modules.pop(1 if family == "llama" else 2)
    device_map = dict.fromkeys(modules, "cpu") | {
        f"{blocks}.{i}": "cpu" if i == 0 else "disk" for i in range(loaded.config.num_hidden_layers)
    }
    offloaded = AutoModelForCausalLM.from_pretrained(
        directories[family], device_map=device_map, offload_folder=tmp_path
    ).eval()
    torch.testing.assert_close(logits(offloaded), logits(loaded))


def test_tied_embeddings_stay_tied(tmp_path):
    values = make_stock_refuse(
        LlamaConfig(**LLAMA, tie_word_embeddings=True).to_dict() | {"per_layer_config": {1: {"intermediate_size": 8}}}
    )
    model = reload(LlamaForCausalLM(LlamaConfig.from_dict(values)).eval(), tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.resize_token_embeddings(LLAMA["vocab_size"] + 4)
    assert logits(model).shape[-1] == LLAMA["vocab_size"] + 4


def test_hidden_size_by_surgery():
    """An embedding, a norm and a tied head change shape, and remember it."""
    config = GPT2Config(**SMALL, n_embd=HIDDEN, n_layer=1, n_head=4)
    modules = {
        "transformer.wte": {"shapes": {"weight": [96, 48]}},
        "transformer.ln_f": {"shapes": {"weight": [48], "bias": [48]}},
        "lm_head": {"shapes": {"weight": [96, 48]}},
        "transformer.h.0.mlp.c_fc": {"shapes": {"weight": [48, 8], "bias": [8]}},
    }
    config.pruning_config = {"surgery": {"modules": modules}}
    model = AutoModelForCausalLM.from_config(config)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert (model.transformer.wte.embedding_dim, model.transformer.ln_f.normalized_shape) == (48, (48,))
    assert (model.lm_head.in_features, model.transformer.h[0].mlp.c_fc.nf, model.transformer.h[0].mlp.c_fc.nx) == (
        48,
        8,
        48,
    )


def test_surgery_reaches_weights_that_an_inner_model_has_initialised():
    """The decoder of OPT is a model of its own, and initialises its weights before the paths can be found."""
    config = OPTConfig(**SMALL, hidden_size=HIDDEN, ffn_dim=96, num_hidden_layers=1, num_attention_heads=4)
    fc1 = {"shapes": {"weight": [80, HIDDEN], "bias": [80]}}
    config.pruning_config = {"surgery": {"modules": {"model.decoder.layers.0.fc1": fc1}}}
    for model in (AutoModelForCausalLM.from_config(config), AutoModel.from_config(config)):
        weight = model.get_decoder().layers[0].fc1.weight
        assert weight.shape == (80, HIDDEN)
        assert 0.01 < weight.std() < 0.04


def test_nested_in_another_model():
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    text = hand_pruned("llama")
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(text_config=make_stock_refuse(text.values), vision_config=vision, image_token_index=95)
    model = LlavaForConditionalGeneration(config)
    found = {name: p.shape for name, p in model.model.language_model.named_parameters()}
    expected = {name.removeprefix("model."): p.shape for name, p in text.state.items() if name.startswith("model.")}
    assert found == expected


# --- what is refused --------------------------------------------------------------------------------------------------


def test_cache_made_without_config_is_refused_where_layer_0_has_no_attention(directories):
    model = AutoModelForCausalLM.from_pretrained(directories["llama_without_first_attention"]).eval()
    with pytest.raises(ValueError, match=r"config=model\.config"):
        model(ids(), past_key_values=DynamicCache())
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=32)):
        with torch.no_grad():
            first = model(ids()[:, :5], past_key_values=cache).logits
            second = model(ids()[:, 5:], past_key_values=cache).logits
        torch.testing.assert_close(torch.cat([first, second], 1), logits(model), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("skip", ["mixer", "mlp"])
def test_wrong_skip_is_refused_and_leaves_nothing_behind(skip):
    values = LlamaConfig(**LLAMA).to_dict() | {"per_layer_config": {"1": {"skip": [skip]}}}
    values["pruning_config"] = {"surgery": {"branches": {"mlp": {"module": "ffn", "outputs": "zeros"}}}}
    with pytest.raises(ValueError, match=r"Layer 1 skips.*(knows|has no module)"):
        LlamaForCausalLM(LlamaConfig.from_dict(values))
    dense = LlamaForCausalLM(LlamaConfig(**LLAMA))
    assert {m.intermediate_size for m in (layer.mlp for layer in dense.model.layers)} == {LLAMA["intermediate_size"]}
    pruned = hand_pruned("llama")
    model = LlamaForCausalLM(LlamaConfig.from_dict(make_stock_refuse(pruned.values)))
    assert {name: p.shape for name, p in model.state_dict().items()} == {n: t.shape for n, t in pruned.state.items()}


def test_surgery_on_a_missing_module_is_refused():
    config = GPT2Config(**SMALL, n_embd=HIDDEN, n_layer=1, n_head=4)
    config.pruning_config = {"surgery": {"modules": {"transformer.h.7.attn": {"shapes": {"c_attn.bias": [3]}}}}}
    with pytest.raises(ValueError, match=r"transformer\.h\.7\.attn"):
        AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("length", [0, -5, True, 2.0, 2**40, "8", None])
def test_a_length_that_is_no_size_is_refused(length):
    def config(length):
        return {"pruning_config": {"surgery": {"modules": {"model.norm": {"shapes": {"weight": [length]}}}}}}

    per_layer.check_config(config(8))
    with pytest.raises(CheckpointError, match="lengths of a tensor"):
        per_layer.check_config(config(length))


def test_family_whose_layers_take_no_index_is_refused():
    from transformers import OpenAIGPTConfig

    config = OpenAIGPTConfig(vocab_size=96, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    config.per_layer_config = {0: {"afn": "relu"}}
    with pytest.raises(ValueError, match="decoder layer class"):
        AutoModelForCausalLM.from_config(config)


def test_layers_that_were_not_reached_are_noticed(monkeypatch):
    monkeypatch.setattr(per_layer, "_patch_layer_classes", lambda model: None)
    with pytest.raises(ValueError, match="reached no layer"):
        _built(CohereConfig)


def test_bloom_branch_without_record_keeps_the_residual():
    """Bloom adds the residual inside of its branches: a stand-in that returned zeros would drop the stream."""
    torch.manual_seed(0)
    values = make_stock_refuse(skip_only("bloom"))
    model = AutoModelForCausalLM.from_config(type(hand_pruned("bloom").masked.config).from_dict(values)).eval()
    dense = copy.deepcopy(hand_pruned("bloom").masked)
    for parameter in (
        *dense.transformer.h[1].self_attention.dense.parameters(),
        *dense.transformer.h[2].mlp.dense_4h_to_h.parameters(),
    ):
        parameter.data.zero_()
    missing, unexpected = model.load_state_dict(hand_pruned("bloom").masked.state_dict(), strict=False)
    assert not missing
    assert all(".h.1.self_attention." in name or ".h.2.mlp." in name for name in unexpected)
    torch.testing.assert_close(logits(model), logits(dense), atol=1e-5, rtol=1e-4)


# --- installation -----------------------------------------------------------------------------------------------------


def test_nothing_is_wrapped_twice():
    from transformers import cache_utils
    from transformers.modeling_utils import PreTrainedModel

    before = PreTrainedModel.__init__, PreTrainedModel.post_init, cache_utils.get_layer_types_and_kwargs
    per_layer.install()
    spec = importlib.util.spec_from_file_location("modeling_hf_prune_copy", SOURCE)
    other = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = other
    spec.loader.exec_module(other)
    other.install()
    after = PreTrainedModel.__init__, PreTrainedModel.post_init, cache_utils.get_layer_types_and_kwargs
    assert before == after


@pytest.mark.parametrize("layers_wrapped_before", [False, True])
def test_steps_aside_where_transformers_builds_the_layers(monkeypatch, layers_wrapped_before):
    if layers_wrapped_before:
        assert len(_zero_branches(_built(Qwen2Config))) == 2
    native = "transformers.integrations.heterogeneity."
    for name in ("modeling_utils", "supported_models"):
        module = types.ModuleType(native + name)
        module.__spec__ = importlib.machinery.ModuleSpec(native + name, None)
        module.MODEL_TYPE_TO_SPEC_FACTORY = {"qwen2": None}
        monkeypatch.setitem(sys.modules, native + name, module)
    assert not _zero_branches(_built(Qwen2Config))
    assert len(_zero_branches(_built(Olmo2Config))) == 2
    monkeypatch.undo()
    assert len(_zero_branches(_built(Qwen2Config))) == 2


def _built(config_class):
    per_layer_config = {1: {"skip": ["attention"]}, 2: {"skip": ["mlp"]}}
    return AutoModelForCausalLM.from_config(config_class(**LLAMA, per_layer_config=per_layer_config))


def _zero_branches(model):
    return [module for module in model.modules() if isinstance(module, per_layer.ZeroBranch)]


def test_a_selected_input_may_be_given_by_position_or_by_name():
    class Attention(torch.nn.Module):
        def forward(self, hidden, alibi, mask=None, scale=1.0):
            return alibi

    module, alibi = Attention(), torch.arange(8.0)
    per_layer._select_input(module, "attn", "alibi", {"dim": 0, "sizes": [-1, 4], "factor": 1, "kept": [1, 3]})
    assert module(torch.zeros(1), alibi, None, 2.0).tolist() == [1.0, 3.0, 5.0, 7.0]
    assert module(torch.zeros(1), alibi=alibi).tolist() == [1.0, 3.0, 5.0, 7.0]
