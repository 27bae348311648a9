"""GGUF files for llama.cpp, in which every layer has its own number of heads and channels.

llama.cpp has two architectures that build layers from per-layer numbers and compute what these families compute:
`deci` (Llama, Mistral, Qwen2) and `openelm` (Qwen3 with a tied head). Models whose layers are equal are written as what
they are; those that neither can hold are made equal by zeros first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_prune.atomic import beside, check_free, replaced_file
from hf_prune.errors import ConfigError, StructureError
from hf_prune.exporting import Exported
from hf_prune.exporting.plain import ordinary, write_plain
from hf_prune.exporting.tokenizer import tokenizer_values
from hf_prune.layers.weights import read_weight
from hf_prune.loading import load_config, load_tokenizer, open_model
from hf_prune.surgery.width_attributes import shapes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from transformers import PreTrainedModel

    from hf_prune.surgery.pruned_config import Shapes

DTYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
_BLOCK = 32  # entries of a row that the quantised types take together

# Model type → architecture where all layers are equal, and where they differ.
_ARCHITECTURES = {"llama": ("llama", "deci"), "mistral": ("llama", "deci"), "qwen2": ("qwen2", "deci")}
_ARCHITECTURES["qwen3"] = ("qwen3", "openelm")
_ROPE_PARAMETERS = frozenset(
    [
        "rope_type",
        "type",
        "rope_theta",
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "low_freq_factor",
        "high_freq_factor",
    ]
)
_INTERLEAVED = ("llama", "deci")
"""Rotary embeddings turn neighbouring pairs of entries; in transformers, entry i and i + half."""

# Name in transformers → name in GGUF, and what its dimensions count.
_OUTSIDE = {
    "model.embed_tokens": ("token_embd", "vocabulary", "hidden"),
    "model.norm": ("output_norm", "hidden"),
    "lm_head": ("output", "vocabulary", "hidden"),
}
_ATTENTION = {
    "input_layernorm": ("attn_norm", "hidden"),
    "self_attn.q_proj": ("attn_q", "queries", "hidden"),
    "self_attn.k_proj": ("attn_k", "keys", "hidden"),
    "self_attn.v_proj": ("attn_v", "keys", "hidden"),
    "self_attn.o_proj": ("attn_output", "hidden", "queries"),
    "self_attn.q_norm": ("attn_q_norm", "head"),
    "self_attn.k_norm": ("attn_k_norm", "head"),
}
_MLP = {
    "post_attention_layernorm": ("ffn_norm", "hidden"),
    "mlp.gate_proj": ("ffn_gate", "mlp", "hidden"),
    "mlp.up_proj": ("ffn_up", "mlp", "hidden"),
    "mlp.down_proj": ("ffn_down", "hidden", "mlp"),
}


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[PreTrainedModel], Tensor]


@dataclass
class _Sizes:
    """What is written, layer by layer, and how large."""

    architecture: str
    hidden: int
    padded_hidden: int
    head_dim: int
    vocabulary: int
    heads: list[int]
    groups: list[int]
    mlp: list[int]
    window: int | None
    notes: list[str] = field(default_factory=list)

    def of(self, dimension: str, layer: int) -> int:
        """Length of a dimension, by its name in the tables above."""
        return {
            "vocabulary": self.vocabulary,
            "hidden": self.padded_hidden,
            "queries": self.heads[layer] * self.head_dim,
            "keys": self.groups[layer] * self.head_dim,
            "head": self.head_dim,
            "mlp": self.mlp[layer],
        }[dimension]


def write_gguf(
    checkpoint: str, output: Path, dtype: str | None, round_to: int | None, trust_remote_code: bool = False
) -> Exported:
    """See `hf_prune.export`."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ConfigError("GGUF files need the package gguf: pip install 'hf_prune[gguf]'.") from error
    config = load_config(checkpoint, trust_remote_code=trust_remote_code)
    base, found = ordinary(config), shapes(config, None)
    dtype = dtype or _own_dtype(config)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: found {dtype!r}, expected one of {DTYPES}.")
    _check(base)
    if found is None:
        raise StructureError(f"{config.model_type}: the model cannot be built from its config.")
    sizes = _sizes(base, found, dtype, round_to or (_BLOCK if dtype.startswith("q") else 1))
    rope, factors = _rope(base, sizes.architecture)
    tokenizer = load_tokenizer(checkpoint, required=True, trust_remote_code=trust_remote_code)
    assert tokenizer is not None
    values = {**_values(base, sizes, dtype), **rope, **tokenizer_values(tokenizer, base, sizes.vocabulary)}
    entries = list(_entries(found, base, sizes, factors))
    if sizes.architecture == "openelm" and not base.tie_word_embeddings:
        with beside(output) as folder:
            plain = write_plain(checkpoint, folder / "plain", None)
            written = write_gguf(str(plain.path), output, dtype, round_to)
        note = "llama.cpp has no architecture for a qwen3 with layers that differ and a head of its own"
        return replace(written, num_parameters=plain.num_parameters, notes=(note, *plain.notes, *written.notes))
    uneven = sum(_type(entry, dtype).name == "F16" for entry in entries) if dtype.startswith("q") else 0
    if uneven:
        sizes.notes.append(f"{uneven} tensors are f16: their rows are no multiple of {_BLOCK}")
    check_free(output, sum(_num_bytes(entry, dtype) for entry in entries))
    source = open_model(checkpoint, layers_on="disk", config=config)
    with replaced_file(output) as new:
        _write(new, sizes.architecture, values, entries, source, dtype)
    num_exported = sum(math.prod(entry.shape) for entry in entries if entry.name != "rope_freqs.weight")
    size = output.stat().st_size
    return Exported(output, sizes.architecture, source.num_parameters(), num_exported, size, tuple(sizes.notes))


def _own_dtype(config: Any) -> str:
    name = str(getattr(config, "dtype", None)).removeprefix("torch.")
    return {"float16": "f16", "bfloat16": "bf16"}.get(name, "f32")


def _check(base: Any) -> None:
    """Refuse what llama.cpp computes in another way, or not at all."""
    if base.model_type not in _ARCHITECTURES:
        raise ConfigError(
            f"found a {base.model_type} model, GGUF export knows {', '.join(_ARCHITECTURES)}. Export it as plain, and "
            "use llama.cpp's own converter if it knows this family."
        )
    if base.hidden_act not in ("silu", "swish"):
        raise ConfigError(f"hidden_act: found {base.hidden_act!r}, llama.cpp computes silu in this architecture.")


def _sizes(base: Any, found: Shapes, dtype: str, round_to: int) -> _Sizes:
    """Sizes of all layers in the file: those of the checkpoint, rounded up where the file format needs it."""
    vocab_size, hidden = found["model.embed_tokens.weight"]
    head_dim = getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads
    layers = range(base.num_hidden_layers)

    def rows(name: str) -> list[int]:
        return [found.get(f"model.layers.{layer}.{name}.weight", (0,))[0] for layer in layers]

    heads, groups = ([n // head_dim for n in rows(f"self_attn.{name}_proj")] for name in "qk")
    channels = rows("mlp.gate_proj")
    mlp = [round_to * math.ceil(max(n, 1) / round_to) for n in channels]
    plain, differing = _ARCHITECTURES[base.model_type]
    equal = len({*zip(heads, groups, mlp, strict=True)}) == 1
    if base.model_type == "qwen2" and heads[0] * head_dim != hidden:  # the one that takes them to be equal
        equal = False
    window = getattr(base, "sliding_window", None)
    sizes = _Sizes(plain if equal else differing, hidden, hidden, head_dim, vocab_size, heads, groups, mlp, window)
    if not equal:
        # A layer without channels would lose its attention as well; the head size is read from layer 0; openelm has no
        # layers without attention.
        per_group = next(h // g for h, g in zip(heads, groups, strict=True) if g)
        for layer in layers:
            if not channels[layer]:
                mlp[layer] = max(mlp[layer], _BLOCK)
            if not groups[layer] and (layer == 0 or differing != "deci"):
                heads[layer], groups[layer] = per_group, 1
    if added := sum(mlp) - sum(channels):
        sizes.notes.append(f"{added:,} MLP channels of zeros were added")
    if dtype.startswith("q") and hidden % _BLOCK and "model.layers.0.self_attn.q_norm.weight" not in found:
        sizes.padded_hidden = _BLOCK * math.ceil(hidden / _BLOCK)
        sizes.notes.append(f"{sizes.padded_hidden - hidden} hidden channels of zeros were added, norms adjusted")
    if window:
        sizes.notes.append(f"llama.cpp attends to all tokens here: right up to {window:,}, the sliding window")
    return sizes


def _rope(base: Any, architecture: str) -> tuple[dict[str, Any], Tensor | None]:
    """What llama.cpp is told of rotary embeddings.

    Returns:
        Values by the `GGUFWriter` method that adds them, and divisors of the frequencies `[head_dim / 2]`, if any.

    Raises:
        ConfigError: it has no such kind of scaling.
    """
    from gguf import RopeScalingType
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = base.rope_parameters
    kind, theta = parameters.get("rope_type", "default"), parameters["rope_theta"]
    values: dict[str, Any] = {"rope_freq_base": theta}
    factors = None
    harmless = {"partial_rotary_factor": 1.0, "truncate": True}
    other = {k: v for k, v in parameters.items() if k not in _ROPE_PARAMETERS and v not in (None, harmless.get(k))}
    if other:
        raise ConfigError(
            f"rope_parameters: found {other}, of which llama.cpp cannot be told. Export as plain instead."
        )
    if kind in ("linear", "yarn"):
        values["rope_scaling_type"] = RopeScalingType.LINEAR if kind == "linear" else RopeScalingType.YARN
        values["rope_scaling_factor"] = parameters["factor"]
    if kind == "yarn":
        inverse, scale = ROPE_INIT_FUNCTIONS[kind](base, "cpu")
        values["rope_scaling_orig_ctx_len"] = parameters["original_max_position_embeddings"]
        values["rope_scaling_yarn_beta_fast"] = float(parameters.get("beta_fast") or 32)
        values["rope_scaling_yarn_beta_slow"] = float(parameters.get("beta_slow") or 1)
        values["rope_scaling_attn_factors"] = scale / (1 + 0.1 * math.log(parameters["factor"]))
    elif kind == "llama3" and architecture in _INTERLEAVED:
        inverse, _ = ROPE_INIT_FUNCTIONS[kind](base, "cpu")
        exponents = torch.arange(len(inverse), dtype=torch.float64) / len(inverse)
        factors = (theta**-exponents / inverse.double()).float()
    elif kind not in ("default", "linear"):
        raise ConfigError(f"rope_parameters: found {kind!r}, which llama.cpp does not have for {architecture}.")
    return values, factors


def _entries(found: Shapes, base: Any, sizes: _Sizes, factors: Tensor | None) -> Iterator[_Entry]:
    """The tensors of the file, in order.

    Raises:
        StructureError: the checkpoint has a tensor that the architecture has no place for.
    """
    outside = {name: parts for name, parts in _OUTSIDE.items() if name != "lm_head" or not base.tie_word_embeddings}
    places = [("", "", outside, 0)]
    for layer, heads in enumerate(sizes.heads):
        parts = {**(_ATTENTION if heads else {}), **_MLP}
        places.append((f"model.layers.{layer}.", f"blk.{layer}.", parts, layer))
    tensors = {*_OUTSIDE, *_ATTENTION, *_MLP}
    foreign = [
        name
        for name in found
        if _in_layer(name).rpartition(".")[0] not in tensors or (name.endswith("bias") and base.model_type == "qwen3")
    ]
    if foreign:
        raise StructureError(f"{foreign[0]}: llama.cpp has no such tensor in {sizes.architecture}.")
    somewhere = {_in_layer(name) for name in found}
    if factors is not None:
        yield _Entry("rope_freqs.weight", tuple(factors.shape), lambda _: factors)
    for prefix, written, parts, layer in places:
        fused = []
        for name, (target, *dimensions) in parts.items():
            for kind in ("weight", "bias"):
                if f"{name}.{kind}" not in somewhere:
                    continue
                full, of = f"{prefix}{name}.{kind}", dimensions if kind == "weight" else dimensions[:1]
                shape = tuple(sizes.of(dimension, layer) for dimension in of)
                entry = _Entry(f"{written}{target}.{kind}", shape, _reader(full, target, shape, found, sizes))
                if sizes.architecture == "openelm" and target in ("attn_q", "attn_k", "attn_v"):
                    fused.append(entry)
                else:
                    yield entry
        if fused:
            rows = sum(entry.shape[0] for entry in fused)
            yield _Entry(f"{written}attn_qkv.weight", (rows, *fused[0].shape[1:]), partial(_together, fused))


def _in_layer(name: str) -> str:
    """A tensor's name without its layer."""
    return name.split(".", 3)[3] if name.startswith("model.layers.") else name


def _reader(
    name: str, target: str, shape: tuple[int, ...], found: Shapes, sizes: _Sizes
) -> Callable[[PreTrainedModel], Tensor]:
    """Reads one tensor: float32 of `shape`, its units first, then zeros; all zeros if the branch was removed."""

    def read(source: PreTrainedModel) -> Tensor:
        if name not in found:
            return torch.zeros(shape)
        tensor = read_weight(source, name).float()
        if target in ("attn_norm", "ffn_norm", "output_norm"):
            tensor = tensor * math.sqrt(sizes.hidden / sizes.padded_hidden)  # the mean of squares counts the zeros
        missing = [n - old for n, old in zip(shape, tensor.shape, strict=True)]
        tensor = pad(tensor, [n for amount in reversed(missing) for n in (0, amount)])
        if target in ("attn_q", "attn_k") and sizes.architecture in _INTERLEAVED:
            half = sizes.head_dim // 2
            tensor = tensor.reshape(-1, 2, half, *tensor.shape[1:]).transpose(1, 2).flatten(0, 2)
        return tensor

    return read


def _together(entries: list[_Entry], source: PreTrainedModel) -> Tensor:
    return torch.cat([entry.read(source) for entry in entries])


def _type(entry: _Entry, dtype: str) -> Any:
    """The GGML type of a tensor: vectors are float32, rows that are no whole blocks float16."""
    from gguf import GGMLQuantizationType

    if len(entry.shape) == 1:
        return GGMLQuantizationType.F32
    if dtype == "q4_0" and entry.name in ("token_embd.weight", "output.weight"):
        dtype = "q8_0"  # as llama.cpp's own tool: these two suffer most
    if dtype.startswith("q") and entry.shape[-1] % _BLOCK:
        dtype = "f16"
    return GGMLQuantizationType[dtype.upper()]


def _num_bytes(entry: _Entry, dtype: str) -> int:
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[_type(entry, dtype)]
    return int(math.prod(entry.shape) // block * size)


def _values(base: Any, sizes: _Sizes, dtype: str) -> dict[str, Any]:
    """What the file says of the model, by the method of `GGUFWriter` that adds it, without `add_`."""
    from gguf import LlamaFileType

    def per_layer(numbers: list[int]) -> int | list[int]:
        return numbers if sizes.architecture in ("deci", "openelm") else numbers[0]

    return {
        "file_type": LlamaFileType["ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"],
        "quantization_version": 2,
        "block_count": len(sizes.mlp),
        "context_length": min(base.max_position_embeddings, sizes.window or base.max_position_embeddings),
        "embedding_length": sizes.padded_hidden,
        "head_count": per_layer(sizes.heads),
        "head_count_kv": per_layer(sizes.groups),
        "feed_forward_length": per_layer(sizes.mlp),
        "key_length": sizes.head_dim,
        "value_length": sizes.head_dim,
        "rope_dimension_count": sizes.head_dim,
        "layer_norm_rms_eps": base.rms_norm_eps * sizes.hidden / sizes.padded_hidden,
        "vocab_size": sizes.vocabulary,
    }


def _write(
    path: Path, architecture: str, values: dict[str, Any], entries: list[_Entry], source: PreTrainedModel, dtype: str
) -> None:
    """Write the file; one tensor at a time is in memory."""
    import numpy as np
    from gguf import GGUFWriter, quant_shape_to_byte_shape, quantize

    writer = GGUFWriter(path, architecture)
    for name, value in values.items():
        getattr(writer, f"add_{name}")(value)
    for entry in entries:
        kind, shape = _type(entry, dtype), entry.shape
        numpy_type = np.dtype({"F32": np.float32, "F16": np.float16}.get(kind.name, np.uint8))
        if numpy_type == np.uint8:
            shape = quant_shape_to_byte_shape(shape, kind)
        writer.add_tensor_info(entry.name, shape, numpy_type, math.prod(shape) * numpy_type.itemsize, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries:
        writer.write_tensor_data(quantize(entry.read(source).numpy(), _type(entry, dtype)))
    writer.close()
