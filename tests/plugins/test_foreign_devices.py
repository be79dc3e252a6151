"""Platforms of strangers serve the demo: one whose tensors are not the host's, and one made of references alone."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]

# Both engines in one process; every way to sample, preemption by a small cache included.
COMPARE = """
import json, sys
from fairlead import LLM, SamplingParams, StructuredOutputParams

prompts = ["ROMEO:", "The king", "a", "To be, or not to be" * 5]
cases = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 0.9, "seed": 5},
    "filtered": {"temperature": 0.9, "seed": 6, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "penalised": {"temperature": 0, "repetition_penalty": 1.2, "frequency_penalty": 0.5, "bad_words": ["the"]},
    "logprobs": {"temperature": 0, "logprobs": 3, "prompt_logprobs": 2},
    "processor": {"temperature": 0, "logits_processors": [lambda logits, prompt, output: logits.clamp(max=5.0)]},
    "several": {"temperature": 1.0, "seed": 1, "n": 3},
    "beams": {"temperature": 0, "use_beam_search": True, "n": 2},
    "regex": {"temperature": 0, "structured_outputs": StructuredOutputParams(regex="[a-z]{5,9}")},
}
settings = dict(dtype="float32", block_size=None, kv_cache_memory=9 << 20, max_model_len=256, max_num_batched_tokens=64)
engines = {name: LLM("demo", platform=name, **settings) for name in ("cpu", sys.argv[1])}
found = {}
for name, llm in engines.items():
    for case, params in cases.items():
        outputs = llm.generate(prompts, SamplingParams(max_tokens=8, **params))
        found.setdefault(case, []).append([list(o.token_ids) for output in outputs for o in output.outputs])
print(json.dumps({case: one == other for case, (one, other) in found.items()}))
print(json.dumps(found["greedy"][0]))
"""


@pytest.mark.parametrize("platform", ["toy", "hello"])
def test_a_strangers_platform_gives_the_cpus_tokens_beside_it_in_one_process(run: Run, platform: str) -> None:
    if platform == "toy":
        skip_without_toy(run)
    done = run("-c", COMPARE, platform)
    assert done.returncode == 0, done.stderr
    equal, tokens = (json.loads(line) for line in done.stdout.splitlines()[-2:])
    assert equal == dict.fromkeys(equal, True)
    assert len(equal) == 9
    assert all(len(ids) == 8 for ids in tokens)


def skip_without_toy(run: Run) -> None:
    records = {r["name"]: r for r in json.loads(run("-m", "fairlead_server.cli", "platforms", "--json").stdout)}
    if records["toy"]["status"] == "unavailable":
        pytest.skip(records["toy"]["reason"])
    assert records["toy"]["status"] == "available", records["toy"]["reason"]


MIXED = """
import torch
from acme_toy.device import register
from fairlead.plugins import choose, create
from fairlead.config import PlatformConfig

platform = create(*choose(PlatformConfig(platform="toy")))
there = platform.allocator.empty((3,), torch.float32, tag="weights").fill_(2.0)
print(there.device, there.cpu().tolist(), (there * 2).device)
for wrong in (lambda: there + torch.ones(3), lambda: there.numpy(), lambda: torch.cat((there, torch.ones(3)))):
    try:
        wrong()
        print("mixed")
    except (RuntimeError, TypeError) as error:
        print(type(error).__name__)
view = there[1:]
platform.allocator.offload("weights")
print(platform.allocator.allocated_bytes("weights"))
platform.allocator.restore("weights")
print(view.cpu().tolist())
"""


def test_the_toys_tensors_are_not_the_hosts(run: Run) -> None:
    skip_without_toy(run)
    done = run("-c", MIXED)
    assert done.returncode == 0, done.stderr
    place, *errors, held, restored = done.stdout.splitlines()
    assert place == "toy:0 [2.0, 2.0, 2.0] toy:0"
    assert "mixed" not in errors
    assert len(errors) == 3
    assert (held, restored) == ("0", "[2.0, 2.0]")


def test_what_the_toy_cannot_do_is_said_at_once(run: Run) -> None:
    skip_without_toy(run)
    wrong = ["--dtype", "bfloat16", "--block-size", "16", "--max-num-batched-tokens", "128"]
    done = run("-m", "fairlead_server.cli", "run", "demo", "a", "--platform", "toy", *wrong)
    assert done.returncode == 2
    for reason in (
        "dtype bfloat16 (it has float32)",
        "block_size 16 (it has 12)",
        "max_num_batched_tokens 128 (at most 64)",
        "max_num_batched_tokens 128 (its largest static shape has 64 rows)",
    ):
        assert reason in done.stderr


@contextmanager
def server(installed: Path, *arguments: str) -> Iterator[str]:
    """The address of a server on a port of the system's choice."""
    path = os.pathsep.join(filter(None, [str(installed), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "fairlead_server.cli", "serve", "demo", "--port", "0", *arguments]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
    ) as process:
        assert process.stdout is not None
        lines = []
        try:
            for line in process.stdout:
                lines.append(line)
                address = re.search(r"http://127\.0\.0\.1:[1-9]\d*", line)
                if address:
                    yield address[0]
                    return
            raise AssertionError("the server ended: " + "".join(lines))
        finally:
            process.send_signal(signal.SIGINT)
            process.stdout.read()
            process.wait()


@pytest.mark.parametrize("platform", ["toy", "hello"])
def test_a_strangers_platform_serves_over_http(run: Run, installed: Path, platform: str) -> None:
    if platform == "toy":
        skip_without_toy(run)
    body = {"model": "demo", "prompt": "ROMEO:", "max_tokens": 12, "temperature": 0}
    texts = []
    for name in ("cpu", platform):
        with server(installed, "--platform", name, "--dtype", "float32") as address:
            request = urllib.request.Request(
                f"{address}/v1/completions",
                data=json.dumps(body).encode(),
                headers={"Content-Type": "application/json"},
            )
            deadline = time.monotonic() + 60
            while True:
                try:
                    with urllib.request.urlopen(request) as response:
                        texts.append(json.load(response)["choices"][0]["text"])
                    break
                except OSError:
                    assert time.monotonic() < deadline, "the server did not answer"
                    time.sleep(0.1)
    assert texts[0] == texts[1] != ""


def test_hello_is_short() -> None:
    folder = Path(__file__).parent / "hello"
    lines = [line for path in folder.iterdir() if path.is_file() for line in path.read_text().splitlines()]
    assert len([line for line in lines if line.strip()]) < 150
    source = (folder / "acme_hello_platform.py").read_text()
    functions = [node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    assert functions == ["memory_info"]


FAMILIES = """
import sys
from pathlib import Path
from fairlead import LLM, SamplingParams
from fairlead.testing.tiny_checkpoint import write_tiny_checkpoint

settings = dict(dtype="float32", attention_backend="reference", num_blocks=60, max_num_batched_tokens=64)
prompts = [{"prompt_token_ids": list(range(3, 3 + n))} for n in (2, 30)]
for kind in sys.argv[2:]:
    model = write_tiny_checkpoint(Path(sys.argv[1]) / kind, kind)
    found = []
    for name in ("cpu", "toy"):
        llm = LLM(str(model), platform=name, skip_tokenizer_init=True, **settings)
        outputs = llm.generate(prompts, SamplingParams(max_tokens=6, temperature=0, ignore_eos=True))
        found.append([list(o.outputs[0].token_ids) for o in outputs])
    print(kind, found[0] == found[1])
"""


def test_other_families_run_on_a_foreign_device(run: Run, tmp_path: Path) -> None:
    """Experts, sliding windows, latent attention, and modelling code of transformers."""
    skip_without_toy(run)
    kinds = ["mixtral", "gemma2", "deepseek_v3", "gpt2", "cohere"]
    done = run("-c", FAMILIES, str(tmp_path), *kinds)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{kind} True" for kind in kinds]
