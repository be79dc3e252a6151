"""Which class runs which architecture: a family's own file, a plugin's, or transformers' modelling code."""

import importlib
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from fairlead import plugins
from fairlead.errors import PluginError, UnsupportedModelError
from fairlead.layers.context import BuildContext, Step
from fairlead.models.config import ModelShape, refuse_rounded_weights

ARCHITECTURES = {
    "BaiChuanForCausalLM": "fairlead.models.baichuan:BaichuanForCausalLM",
    "BaichuanForCausalLM": "fairlead.models.baichuan:BaichuanForCausalLM",
    "ChatGLMForConditionalGeneration": "fairlead.models.chatglm:ChatGLMForConditionalGeneration",
    "ChatGLMModel": "fairlead.models.chatglm:ChatGLMForConditionalGeneration",
    "DeepseekV2ForCausalLM": "fairlead.models.deepseek:DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM": "fairlead.models.deepseek:DeepseekV3ForCausalLM",
    "FalconForCausalLM": "fairlead.models.falcon:FalconForCausalLM",
    "GPT2LMHeadModel": "fairlead.models.gpt2:GPT2LMHeadModel",
    "GPTJForCausalLM": "fairlead.models.gptj:GPTJForCausalLM",
    "GPTNeoXForCausalLM": "fairlead.models.gpt_neox:GPTNeoXForCausalLM",
    "Gemma2ForCausalLM": "fairlead.models.gemma2:Gemma2ForCausalLM",
    "Gemma3ForCausalLM": "fairlead.models.gemma3:Gemma3ForCausalLM",
    "GemmaForCausalLM": "fairlead.models.gemma:GemmaForCausalLM",
    "LlamaForCausalLM": "fairlead.models.llama:LlamaForCausalLM",
    "MistralForCausalLM": "fairlead.models.mistral:MistralForCausalLM",
    "MixtralForCausalLM": "fairlead.models.mixtral:MixtralForCausalLM",
    "OPTForCausalLM": "fairlead.models.opt:OPTForCausalLM",
    "Olmo2ForCausalLM": "fairlead.models.olmo:Olmo2ForCausalLM",
    "OlmoForCausalLM": "fairlead.models.olmo:OlmoForCausalLM",
    "Phi3ForCausalLM": "fairlead.models.phi3:Phi3ForCausalLM",
    "PhiForCausalLM": "fairlead.models.phi:PhiForCausalLM",
    "Qwen2ForCausalLM": "fairlead.models.qwen2:Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM": "fairlead.models.qwen_moe:Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM": "fairlead.models.qwen3:Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM": "fairlead.models.qwen_moe:Qwen3MoeForCausalLM",
    "RWForCausalLM": "fairlead.models.falcon:FalconForCausalLM",
    "SmolLM3ForCausalLM": "fairlead.models.smollm3:SmolLM3ForCausalLM",
    "StableLmForCausalLM": "fairlead.models.stablelm:StableLmForCausalLM",
}
"""The families that have a file here."""

FALLBACK = "fairlead.models.transformers_fallback:TransformersForCausalLM"


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
    _find(architecture)


def read_config(architecture: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config as the architecture's class wants it, with the sizes under the names that ModelShape reads."""
    refuse_rounded_weights(config)
    read = getattr(_load(_find(architecture)), "read_config", None)
    result: Mapping[str, Any] = config if read is None else read(config)
    return result


def build_model(architecture: str, config: Mapping[str, Any], shape: ModelShape, ctx: BuildContext) -> torch.nn.Module:
    """Makes the model, its weights on the meta device. `config` is what read_config returned."""
    model: torch.nn.Module = _load(_find(architecture))(config, shape, ctx)
    return model


def _find(architecture: str) -> str:
    """ "module:Class" of an architecture."""
    if architecture in ARCHITECTURES:
        return ARCHITECTURES[architecture]
    brought = plugins.model_classes()
    if architecture in brought:
        return brought[architecture]
    from fairlead.models import transformers_fallback  # takes seconds to import: only where nothing else serves

    if transformers_fallback.check_supported(architecture):
        return FALLBACK
    raise UnsupportedModelError(
        f"architecture {architecture!r} is not supported; it has no file here, no plugin brings it and transformers "
        f"does not know it; those with a file are: {', '.join(sorted({*ARCHITECTURES, *brought}))}"
    )


def _load(path: str) -> Any:
    module, name = path.split(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise PluginError(f"the model class {path} that a plugin names cannot be imported: {error}") from error
