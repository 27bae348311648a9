"""Write `modeling_hf_prune.py`: the file that lets a pruned repository load with `trust_remote_code=True` alone."""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING

from hf_prune.errors import CheckpointError
from hf_prune.format.building import has_own_code

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    from transformers import PreTrainedConfig

MODULE_NAME = "modeling_hf_prune"
"""Name of the file in the repository, without `.py`."""

_AUTO_CLASSES = {
    "AutoModel": "MODEL_MAPPING_NAMES",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
}


def remote_code(architectures: Sequence[str], model_type: str, source: str) -> str:
    """Text of the file: `source`, then subclasses of the family's own classes under the same names.

    The names stay, so that `architectures` of a model saved again still names classes of transformers.

    Args:
        architectures: class names as in config.json, e.g. `["LlamaForCausalLM"]`.
        model_type: the family, e.g. `"llama"`.
        source: text of `checkpoint/per_layer.py`.

    Returns:
        Python source that imports only torch and transformers.

    Raises:
        CheckpointError: `model_type` or one of `architectures` is not a family or class of transformers.
    """
    modeling, names = _family(model_type, architectures)
    lines = [source.rstrip(), "", "", f"import {modeling.__name__} as _modeling  # noqa: E402", "", "install()"]
    if "@use_experts_implementation" in inspect.getsource(modeling):
        lines += ["# transformers allows to choose the experts implementation if it reads this in a model's file:"]
        lines += ["# @use_experts_implementation"]
    for name in dict.fromkeys(names.values()):
        lines += ["", "", f"class {name}(_modeling.{name}):", f'    """{name}, with layers of different widths."""']
        lines += ["", "    @classmethod", "    def is_custom_code(cls):"]
        lines += ["        return False  # tensors lie in the files as transformers' own class has them"]
    return "\n".join(lines) + "\n"


def own_class(cls: type) -> type | None:
    """The class behind `cls` whose code came with a checkpoint; `None` if it is one of transformers, or of the user."""
    found = next(one for one in cls.__mro__ if not one.__module__.endswith(f".{MODULE_NAME}"))
    return found if has_own_code(found) else None


def beside_own_code(cls: type, source: str) -> str:
    """Text of the file for a model whose code came with it: `source`, and a subclass of its class in its own file.

    Args:
        cls: class of the model, as `own_class` gives it.
        source: text of `checkpoint/per_layer.py`.
    """
    name, file = cls.__name__, cls.__module__.rpartition(".")[2]
    lines = [source.rstrip(), "", "", f"from .{file} import {name} as _{name}  # noqa: E402", "", "install()", "", ""]
    lines += [f"class {name}(_{name}):", f'    """{name}, with layers of different widths."""']
    return "\n".join(lines) + "\n"


def auto_map(config: PreTrainedConfig) -> dict[str, str]:
    """The `auto_map` of config.json that goes with `remote_code`.

    Returns:
        Reference per auto class, e.g. `{"AutoModelForCausalLM": "modeling_hf_prune.LlamaForCausalLM", ...}`: the base
        model, the causal LM, and what else `config.architectures` names.

    Raises:
        CheckpointError: see `remote_code`.
    """
    _, names = _family(config.model_type, config.architectures or [])
    return {auto_class: f"{MODULE_NAME}.{name}" for auto_class, name in names.items()}


def _family(model_type: str, architectures: Sequence[str]) -> tuple[ModuleType, dict[str, str]]:
    """The modeling module of a family, and the class name per auto class."""
    import transformers
    from transformers.models.auto import modeling_auto

    names = {}
    for auto_class, mapping_name in _AUTO_CLASSES.items():
        name = getattr(modeling_auto, mapping_name).get(model_type)
        if isinstance(name, str) and (auto_class in ("AutoModel", "AutoModelForCausalLM") or name in architectures):
            names[auto_class] = name
    unknown = [name for name in architectures if name not in names.values()]
    if not names or unknown:
        raise CheckpointError(
            f"model type {model_type!r}: transformers has no {', '.join(unknown) or 'model'} for it, so no remote code "
            "can be written. Save the model as a class of transformers, or keep the model's own code."
        )
    modeling = importlib.import_module(getattr(transformers, next(iter(names.values()))).__module__)
    return modeling, names
