"""Weights from safetensors into a model: each tensor in its place, and every fault found before memory is allocated."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fairlead.checkpoint import Checkpoint
from fairlead.config import ModelConfig
from fairlead.errors import CheckpointError, ModelError, ModelNotFoundError, UnsupportedModelError
from fairlead.layers.context import BuildContext
from fairlead.models import loader, registry
from fairlead.models.config import ModelShape
from fairlead.testing.tiny_model import write_tiny_llama

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYER = "model.layers.1."


class CountingAllocator:
    """Host memory, full of NaN so that a place nobody fills shows; counts what it ever handed out."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, *, tag: str) -> torch.Tensor:
        assert tag == "weights"
        tensor = torch.full(shape, torch.nan, dtype=dtype)
        self.num_bytes += tensor.nbytes
        return tensor

    def allocated_bytes(self, tag: str) -> int:
        return self.num_bytes


def build(directory: Path, dtype: str = "float32") -> tuple[torch.nn.Module, Checkpoint]:
    checkpoint = Checkpoint.open(ModelConfig(model=str(directory)))
    context = BuildContext.reference(dtype=DTYPES[dtype], max_model_len=64)
    shape = ModelShape.of(checkpoint.config)
    return registry.build_model(checkpoint.architecture, checkpoint.config, shape, context), checkpoint


def load(directory: Path, dtype: str = "float32") -> dict[str, torch.Tensor]:
    """The loaded model's parameters by name."""
    model, checkpoint = build(directory, dtype)
    allocator = CountingAllocator()
    num_bytes = loader.load_weights(model, checkpoint, allocator)
    assert num_bytes == allocator.num_bytes == sum(p.nbytes for p in model.parameters())
    return dict(model.named_parameters(remove_duplicate=False))


def expect_error(directory: Path, kind: type[ModelError], match: str) -> str:
    """Loading fails with one line, before anything is allocated."""
    model, checkpoint = build(directory)
    allocator = CountingAllocator()
    with pytest.raises(kind, match=match) as error:
        loader.load_weights(model, checkpoint, allocator)
    assert allocator.num_bytes == 0
    assert all(p.is_meta for p in model.parameters())
    assert "\n" not in str(error.value)
    return str(error.value)


def change(directory: Path, **changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Rewrites the weights with some tensors replaced, added or (None) left out; returns them."""
    file = directory / "model.safetensors"
    tensors = {**load_file(file), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, file)
    return kept


def shard(directory: Path, num_shards: int) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    weight_map = {}
    for i in range(num_shards):
        names = sorted(tensors)[i::num_shards]
        name = f"model-{i + 1:05}-of-{num_shards:05}.safetensors"
        save_file({n: tensors[n] for n in names}, directory / name)
        weight_map.update(dict.fromkeys(names, name))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def check_placed(found: dict[str, torch.Tensor], stored: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Every parameter holds what the files say, merged ones row by row."""
    parts = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    num_checked = 0
    for name, parameter in found.items():
        merged = next((m for m in parts if m in name), None)
        names = [name.replace(merged, part) for part in parts[merged]] if merged else [name]
        if name == "lm_head.weight" and name not in stored:
            names = ["model.embed_tokens.weight"]
        assert torch.equal(parameter, torch.cat([stored[n].to(dtype) for n in names])), name
        assert parameter.dtype == dtype
        assert not parameter.requires_grad
        num_checked += len(names)
    assert num_checked >= len([n for n in stored if "inv_freq" not in n])


@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("stored_as", ["float32", "bfloat16", "float16"])
def test_dtypes_are_converted_on_load(tmp_path: Path, stored_as: str, to: str) -> None:
    write_tiny_llama(tmp_path, dtype=stored_as)
    check_placed(load(tmp_path, to), load_file(tmp_path / "model.safetensors"), DTYPES[to])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_merged_weights_and_biases_lie_in_order(tmp_path: Path, kv_heads: int, bias: bool) -> None:
    write_tiny_llama(tmp_path, num_kv_heads=kv_heads, attention_bias=bias)
    found = load(tmp_path)
    assert ("model.layers.0.self_attn.qkv_proj.bias" in found) == bias
    check_placed(found, load_file(tmp_path / "model.safetensors"), torch.float32)


@pytest.mark.parametrize("num_shards", [1, 2, 5])
def test_shards_hold_the_same_model(tmp_path: Path, num_shards: int) -> None:
    write_tiny_llama(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    shard(tmp_path, num_shards)
    check_placed(load(tmp_path), stored, torch.float32)


def test_a_tied_head_shares_the_embedding(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path, tie_word_embeddings=True)
    found = load(tmp_path)
    assert found["lm_head.weight"] is found["model.embed_tokens.weight"]
    stored = change(tmp_path, **{"lm_head.weight": torch.zeros(128, 64)})  # some files hold a copy; it is not read
    again = load(tmp_path)
    assert torch.equal(again["lm_head.weight"], stored["model.embed_tokens.weight"])


def test_an_untied_head_is_its_own(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    found = load(tmp_path)
    assert not torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    change(tmp_path, **{"lm_head.weight": None})
    expect_error(tmp_path, CheckpointError, r"tensor 'lm_head\.weight' is missing \(1 in all\)")


def test_frequencies_stored_by_old_versions_are_ignored(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    stored = change(tmp_path, **{f"{LAYER}self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    check_placed(load(tmp_path), stored, torch.float32)


def test_dummy_weights_are_finite_and_seeded(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path, attention_bias=True)
    (tmp_path / "model.safetensors").unlink()
    made = []
    for seed in (0, 0, 1):
        model, _ = build(tmp_path, "bfloat16")
        allocator = CountingAllocator()
        assert loader.dummy_weights(model, allocator, seed=seed) == allocator.num_bytes > 0
        made.append(dict(model.named_parameters()))
    assert all(p.isfinite().all() for p in made[0].values())
    name = f"{LAYER}mlp.down_proj.weight"
    assert torch.equal(made[0][name], made[1][name])
    assert not torch.equal(made[0][name], made[2][name])


@pytest.mark.parametrize("name", [f"{LAYER}self_attn.k_proj.weight", f"{LAYER}mlp.up_proj.weight", "model.norm.weight"])
def test_a_missing_tensor(tmp_path: Path, name: str) -> None:
    write_tiny_llama(tmp_path)
    change(tmp_path, **{name: None})
    assert str(tmp_path) in expect_error(tmp_path, CheckpointError, f"tensor '{name}' is missing")


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", f"{LAYER}self_attn.q_proj.bias", "x"])
def test_an_extra_tensor(tmp_path: Path, name: str) -> None:
    write_tiny_llama(tmp_path)
    change(tmp_path, **{name: torch.zeros(3)})
    message = expect_error(tmp_path, CheckpointError, f"tensor '{name}' has no place in this architecture")
    assert str(tmp_path / "model.safetensors") in message


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (f"{LAYER}self_attn.k_proj.weight", (64, 64)),  # all kv-heads of a model without shared ones
        (f"{LAYER}self_attn.q_proj.weight", (64, 32)),
        ("model.embed_tokens.weight", (129, 64)),
        ("lm_head.weight", (127, 64)),
        ("model.norm.weight", (64, 1)),
        ("model.norm.weight", ()),
    ],
)
def test_a_mis_shaped_tensor(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    write_tiny_llama(tmp_path)
    change(tmp_path, **{name: torch.zeros(shape)})
    message = expect_error(tmp_path, CheckpointError, f"tensor '{name}' has shape .*, but config.json asks for")
    assert str(tmp_path / "model.safetensors") in message
    assert str(shape) in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_a_tensor_of_a_dtype_that_is_no_weight(tmp_path: Path, dtype: torch.dtype) -> None:
    write_tiny_llama(tmp_path)
    change(tmp_path, **{"model.norm.weight": torch.zeros(64).to(dtype)})
    expect_error(tmp_path, CheckpointError, r"'model\.norm\.weight' has dtype .*; supported: BF16, F16, F32, F64")


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    shard(tmp_path, 3)
    file = sorted(tmp_path.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-1])
    expect_error(tmp_path, CheckpointError, f"{file.name} is truncated: tensor '.*' ends at byte")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    shard(tmp_path, 3)
    file = sorted(tmp_path.glob("*.safetensors"))[1]
    file.unlink()
    expect_error(tmp_path, ModelNotFoundError, f"index.json names '{file.name}', which is not in its directory")


def test_overlapping_tensors_are_named(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    file = tmp_path / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    norms = [name for name in header if name.endswith("layernorm.weight")]
    header[norms[0]]["data_offsets"] = header[norms[1]]["data_offsets"]
    changed = json.dumps(header).encode()
    file.write_bytes(len(changed).to_bytes(8, "little") + changed + raw[8 + length :])
    expect_error(tmp_path, CheckpointError, "starts at byte .* of the data, not")


def test_only_pickled_weights(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    expect_error(tmp_path, ModelNotFoundError, r"pytorch_model\.bin is not read .* convert it with save_pretrained")


@pytest.mark.parametrize(
    ("changes", "kind", "match"),
    [
        (
            {"architectures": ["NoSuchForCausalLM"]},
            UnsupportedModelError,
            "'NoSuchForCausalLM' is not supported; .* those with a file are: BaiChuanForCausalLM",
        ),
        ({"architectures": None}, CheckpointError, "names no model class"),
        ({"hidden_act": "gelu"}, UnsupportedModelError, "hidden_act 'gelu' is not supported here; supported: silu"),
        ({"intermediate_size": "128"}, CheckpointError, "intermediate_size must be an integer"),
        ({"intermediate_size": None}, CheckpointError, "intermediate_size must be an integer"),
        ({"rms_norm_eps": "small"}, CheckpointError, "rms_norm_eps must be a number above 0"),
        ({"hidden_size": 2**40}, CheckpointError, "hidden_size must be an integer"),
        ({"num_hidden_layers": 2**20}, CheckpointError, "num_hidden_layers must be an integer"),
        ({"rope_parameters": {"rope_type": "ntk"}}, UnsupportedModelError, "rope_type 'ntk' is not supported"),
        ({"rope_parameters": {"rope_theta": None}}, CheckpointError, "rope_theta must be a number above 0"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_built(
    tmp_path: Path, changes: dict[str, Any], kind: type[ModelError], match: str
) -> None:
    write_tiny_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(kind, match=match):
        build(tmp_path)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim"])
def test_sizes_far_beyond_the_files_allocate_nothing(tmp_path: Path, key: str) -> None:
    write_tiny_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    largest = {"head_dim": 2**12, "num_attention_heads": 2**12}.get(key, 2**24)
    (tmp_path / "config.json").write_text(json.dumps({**config, key: largest}))
    expect_error(tmp_path, CheckpointError, "has shape .*, but config.json asks for")
