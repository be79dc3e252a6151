"""Loading takes no more memory than the model and one shard, measured in a process of its own.

The shards are read by mmap, and their pages count into the process's resident size although the kernel may drop them at
any time. So the anonymous memory is measured (RssAnon of /proc/self/status, sampled while the loader runs).
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

MIB = 2**20
NUM_SHARDS = 4
SLACK_BYTES = 24 * MIB  # of 100 to 400: what Python, torch's threads and the arenas of the allocator take meanwhile

MEASURE = """
import sys, threading
from pathlib import Path

import torch

from fairlead.config import EngineConfig
from fairlead.engine.planner import plan_engine
from fairlead.models import loader


def anonymous_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


plan = plan_engine(EngineConfig.of(model=sys.argv[1], dtype=sys.argv[2], num_blocks=8, max_model_len=64))
model = plan.build_model()
torch.ones(4096, 4096, dtype=torch.bfloat16).to(torch.float32).sum()  # threads and their arenas are there
done, peak, before = threading.Event(), 0, anonymous_bytes()


def sample():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous_bytes())


sampler = threading.Thread(target=sample, daemon=True)
sampler.start()
num_bytes = loader.load_weights(model, plan.checkpoint, plan.platform.allocator)
done.set()
sampler.join()
peak = max(peak, anonymous_bytes())
print(num_bytes, peak - before)
"""


def write_checkpoint(directory: Path, family: str, dtype: torch.dtype, scale: int) -> int:
    """A model like Llama in four shards, each tensor's neighbours in other ones; returns the largest file's size."""
    E, F, V, L = 256 * scale, 512 * scale, 4096 * scale, 8
    config = {
        "architectures": [f"{family}ForCausalLM"], "model_type": family.lower(), "vocab_size": V, "hidden_size": E,
        "intermediate_size": F, "num_hidden_layers": L, "num_attention_heads": 4, "num_key_value_heads": 4,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": (V, E), "lm_head.weight": (V, E), "model.norm.weight": (E,)}
    for i in range(L):
        prefix = f"model.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{prefix}self_attn.{name}.weight"] = (E, E)
        shapes |= {f"{prefix}mlp.{name}.weight": (F, E) for name in ("gate_proj", "up_proj")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (E, F)
        shapes |= {f"{prefix}{name}.weight": (E,) for name in ("input_layernorm", "post_attention_layernorm")}
    generator = torch.Generator().manual_seed(0)
    weight_map, largest = {}, 0
    for shard in range(NUM_SHARDS):
        names = list(shapes)[shard::NUM_SHARDS]
        file = directory / f"model-{shard}.safetensors"
        save_file({n: torch.randn(shapes[n], generator=generator).to(dtype) for n in names}, file)
        largest = max(largest, file.stat().st_size)
        weight_map |= dict.fromkeys(names, file.name)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return largest


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only /proc tells anonymous memory apart")
@pytest.mark.parametrize(
    ("family", "stored", "loaded"),
    [
        ("Llama", "bfloat16", "bfloat16"),
        ("Llama", "bfloat16", "float32"),
        ("Llama", "float32", "bfloat16"),
        ("Granite", "float32", "bfloat16"),  # transformers' own code and loading
    ],
)
def test_the_peak_is_the_model_and_one_shard(
    tmp_path: Path, family: str, stored: str, loaded: str, count: Callable[..., int]
) -> None:
    shard_bytes = write_checkpoint(tmp_path, family, getattr(torch, stored), count(3, full=5))
    command = [sys.executable, "-c", MEASURE, str(tmp_path), loaded]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    num_bytes, peak = map(int, done.stdout.split())
    stored_bytes = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    item_bytes = {"bfloat16": 2, "float32": 4}
    assert num_bytes == pytest.approx(stored_bytes * item_bytes[loaded] / item_bytes[stored], rel=0.01)
    assert num_bytes > 90 * MIB
    assert peak <= num_bytes + shard_bytes + SLACK_BYTES
    assert peak >= num_bytes - MIB, "the measurement sees what is loaded"
    sizes = f"model {num_bytes / MIB:.0f} MiB, shard {shard_bytes / MIB:.0f}, peak {peak / MIB:.0f}"
    print(f"{family}, {stored} to {loaded}: {sizes}")
