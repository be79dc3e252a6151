"""Decoders that run through transformers' own code: equal output, or a refusal in one line."""

import importlib.util
import json
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fairlead import LLM
from fairlead.errors import CheckpointError, ModelError, UnsupportedModelError
from fairlead.models.registry import ARCHITECTURES
from fairlead.testing.reference import Reference, check_faults_show, check_greedy, check_logits, prompts_for
from fairlead.testing.tiny_checkpoint import write_tiny_checkpoint

MODES: dict[str, dict[str, Any]] = {
    "at once": {},
    "chunks of 16": {"max_num_batched_tokens": 16},
}
TYPES: dict[str, dict[str, Any]] = {
    "arcee": {},
    "bitnet": {},
    "cohere": {"logit_scale": 0.5, "use_qk_norm": True},
    "cohere2": {},  # three sliding-window layers without position, or with, to a full one
    "ernie4_5": {},
    "exaone4": {},
    "glm": {},
    "glm4": {},
    "granite": {"logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
    "granitemoe": {},
    "helium": {},
    "hunyuan_v1_dense": {},
    "olmo3": {},
    "seed_oss": {},
    "starcoder2": {"sliding_window": 24},
}


WINDOWED = ("cohere2", "exaone4", "olmo3", "starcoder2")


@pytest.fixture(scope="module", params=TYPES)
def model_type(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def reference(model_type: str, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    directory = tmp_path_factory.mktemp(model_type)
    return Reference.of_transformers(write_tiny_checkpoint(directory, model_type, seed=1, settings=TYPES[model_type]))


@pytest.mark.parametrize("mode", MODES)
def test_n1_greedy_equals_transformers(reference: Reference, mode: str, count: Callable[..., int]) -> None:
    check_greedy(reference, prompts_for(512, count(8, full=32), count(80, full=300)), count(24, full=64), **MODES[mode])


def test_logits_equal_transformers(reference: Reference) -> None:
    check_logits(reference, *prompts_for(512, 1))


def test_a_wrong_position_window_or_head_would_show(reference: Reference, model_type: str) -> None:
    check_faults_show(reference, *prompts_for(512, 1), is_windowed=model_type in WINDOWED)


def write_config(directory: Path, kind: str, architecture: str | None = None, **settings: Any) -> str:
    """A directory with nothing but the config of a type, its defaults or the settings given."""
    config = transformers.CONFIG_MAPPING[kind]()
    values = json.loads(config.to_json_string(use_diff=False))
    values["architectures"] = [architecture or transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    (directory / "config.json").write_text(json.dumps({**values, **settings}), encoding="utf-8")
    return str(directory)


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("bamba", {}, "recurrent state"),
        ("mamba", {}, "recurrent state"),
        ("bloom", {}, "takes no position_ids"),
        ("gpt_oss", {}, "attention sinks"),
        ("codegen", {}, "does not use transformers' attention interface"),
        ("gpt_neo", {}, "attention classes of its own"),
        ("lfm3", {}, "convolves over tokens"),
        ("llama4_text", {}, "layers of the kind 'chunked_attention'"),
        ("bert", {}, "masks its attention neither causally nor by a sliding window"),
        ("prophetnet", {}, "attends to an encoder"),
        ("diffllama", {}, "one attention layer several times"),
        (
            "cohere",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type 'dynamic'",
        ),
        ("cohere", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ("cohere", {"model_type": "acme"}, "model_type 'acme' is unknown"),
        ("emu3", {}, "made of several models"),
    ],
)
def test_what_cannot_be_run_is_refused(tmp_path: Path, model_type: str, settings: dict[str, Any], reason: str) -> None:
    directory = write_config(tmp_path, model_type, **settings)
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        LLM(directory, dtype="float32", load_format="dummy", skip_tokenizer_init=True, max_model_len=64)
    assert "\n" not in str(caught.value)


def test_positions_that_do_not_count_from_zero_are_found(tmp_path: Path) -> None:
    directory = write_tiny_checkpoint(tmp_path, "roberta", settings={"is_decoder": True})
    with pytest.raises(UnsupportedModelError, match="positions do not count from 0"):
        LLM(str(directory), dtype="float32", skip_tokenizer_init=True, max_model_len=64)


def test_a_config_that_transformers_refuses_is_a_broken_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="transformers cannot read it"):
        LLM(write_config(tmp_path, "cohere", hidden_size="wide"), skip_tokenizer_init=True)


def test_a_class_that_is_not_its_types_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"asks for GlmForCausalLM, but .* is CohereForCausalLM"):
        LLM(write_config(tmp_path, "cohere", "GlmForCausalLM"), skip_tokenizer_init=True, max_model_len=64)


def test_an_unknown_architecture_lists_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"'AcmeForCausalLM' is not supported.*LlamaForCausalLM"):
        LLM(write_config(tmp_path, "cohere", "AcmeForCausalLM"), skip_tokenizer_init=True)


@pytest.mark.parametrize("change", ["missing", "extra", "reshaped"])
def test_a_tensor_that_does_not_fit_is_named(tmp_path: Path, change: str) -> None:
    from safetensors.torch import load_file, save_file

    file = write_tiny_checkpoint(tmp_path, "cohere") / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    if change == "extra":
        name = "model.layers.7.mlp.up_proj.weight"
        tensors[name] = torch.zeros(2)
    else:
        tensors[name] = torch.zeros(3, 3)
    if change == "missing":
        del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=name):
        LLM(str(tmp_path), dtype="float32", skip_tokenizer_init=True)


def test_dummy_weights_run(tmp_path: Path) -> None:
    directory = write_tiny_checkpoint(tmp_path, "granite")
    (directory / "model.safetensors").unlink()
    llm = LLM(str(directory), dtype="bfloat16", load_format="dummy", skip_tokenizer_init=True, max_model_len=64)
    assert llm.engine is not None
    llm.close()


def generator() -> types.ModuleType:
    path = Path(__file__).parents[3] / "docs" / "generate_models.py"
    spec = importlib.util.spec_from_file_location("docs_generate_models", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_models_is_up_to_date() -> None:
    """A sample of its rows is found again, and no class of transformers is left out."""
    docs = generator()
    page = docs.MODELS_PAGE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__} " not in page:
        pytest.skip("docs/models.md was generated with another version of transformers")
    for architecture in docs.architectures().values():
        assert f"| `{architecture}` |" in page
    for model_type in ("cohere", "gpt_oss", "mamba", "llama"):
        assert str(docs.try_type(model_type, docs.architectures()[model_type])) in page


def test_every_class_with_a_file_of_ours_has_a_case_and_so_have_ten_without() -> None:
    docs = generator()
    cases = docs.tested_cases()
    known_by_another_name = {"RWForCausalLM"}  # Falcon's, as first published
    assert set(ARCHITECTURES) - known_by_another_name <= set(cases)
    fallback = [name for name in docs.architectures().values() if name in cases and name not in ARCHITECTURES]
    assert len(fallback) >= 10
    page = docs.MODELS_PAGE.read_text(encoding="utf-8")
    for architecture, names in cases.items():
        assert re.search(rf"`{architecture}` .*; tested as {', '.join(names)} \\|", page), architecture


def test_every_refusal_is_a_model_error() -> None:
    assert issubclass(UnsupportedModelError, ModelError)
