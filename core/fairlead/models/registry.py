"""Which class runs which architecture."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from fairlead.errors import UnsupportedModelError
from fairlead.layers.context import BuildContext, Step
from fairlead.models.config import ModelShape, refuse

ARCHITECTURES = {
    "DeepseekV2ForCausalLM": "fairlead.models.deepseek:DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM": "fairlead.models.deepseek:DeepseekV3ForCausalLM",
    "Gemma2ForCausalLM": "fairlead.models.gemma2:Gemma2ForCausalLM",
    "Gemma3ForCausalLM": "fairlead.models.gemma3:Gemma3ForCausalLM",
    "GemmaForCausalLM": "fairlead.models.gemma:GemmaForCausalLM",
    "LlamaForCausalLM": "fairlead.models.llama:LlamaForCausalLM",
    "MistralForCausalLM": "fairlead.models.mistral:MistralForCausalLM",
    "MixtralForCausalLM": "fairlead.models.mixtral:MixtralForCausalLM",
    "Olmo2ForCausalLM": "fairlead.models.olmo:Olmo2ForCausalLM",
    "OlmoForCausalLM": "fairlead.models.olmo:OlmoForCausalLM",
    "Phi3ForCausalLM": "fairlead.models.phi3:Phi3ForCausalLM",
    "Qwen2ForCausalLM": "fairlead.models.qwen2:Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM": "fairlead.models.qwen_moe:Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM": "fairlead.models.qwen3:Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM": "fairlead.models.qwen_moe:Qwen3MoeForCausalLM",
    "SmolLM3ForCausalLM": "fairlead.models.smollm3:SmolLM3ForCausalLM",
    "StableLmForCausalLM": "fairlead.models.stablelm:StableLmForCausalLM",
}
"""The families that have a file here."""


class CausalLM(Protocol):
    """What the model runner asks of a model.

    Its class is made with (config, shape, ctx). It may have a static or class method `read_config`, which turns
    config.json into what ModelShape reads and the class gets; and two attributes for the loader: `checkpoint_names`,
    which turns parts of our parameter names into the checkpoint's, and `unused_weights`, prefixes of stored tensors
    that are not read.
    """

    def __call__(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor, step: Step) -> torch.Tensor:
        """Hidden states (T, E) of the step's packed tokens."""
        ...

    def logits(self, hidden_SE: torch.Tensor) -> torch.Tensor:
        """Logits (S, V) in float32 of chosen hidden states."""
        ...


def check_supported(architecture: str) -> None:
    """Raises UnsupportedModelError, listing what there is, for an architecture without a class."""
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"architecture {architecture!r} is not supported; supported: {', '.join(sorted(ARCHITECTURES))}"
        )


def read_config(architecture: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config as the architecture's class wants it; UnsupportedModelError as above."""
    check_supported(architecture)
    refuse(config, "quantization_config")
    read = getattr(_model_class(architecture), "read_config", None)
    result: Mapping[str, Any] = config if read is None else read(config)
    return result


def build_model(architecture: str, config: Mapping[str, Any], shape: ModelShape, ctx: BuildContext) -> torch.nn.Module:
    """Makes the model, its weights on the meta device. `config` is what read_config returned."""
    check_supported(architecture)
    return _model_class(architecture)(config, shape, ctx)


def _model_class(architecture: str) -> Callable[[Mapping[str, Any], ModelShape, BuildContext], torch.nn.Module]:
    module, name = ARCHITECTURES[architecture].split(":")
    found: Callable[[Mapping[str, Any], ModelShape, BuildContext], torch.nn.Module]
    found = getattr(importlib.import_module(module), name)
    return found
