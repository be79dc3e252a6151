"""The conformance kit on the platforms' device code, over fake devices; and on this machine, which has none."""

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fairlead import LLM, SamplingParams
from fairlead.config import PlatformConfig
from fairlead.errors import PlatformUnavailableError
from fairlead.plugins import choose
from fairlead.testing.conformance import Kit, conform
from fairlead.testing.tiny_model import write_tiny_llama

HERE = Path(__file__).parent / "fakes"
NAMES = ("cuda", "rocm", "xpu")
REASONS = {"cuda": "no NVIDIA driver: ", "rocm": "no AMD driver: ", "xpu": "no Intel GPU: "}


@pytest.fixture
def _faked(tmp_path: Path) -> Iterator[None]:
    """The plugin of fakes/ as if pip had installed it, and none beside it."""
    folder = tmp_path / "site"
    folder.mkdir()
    for file in HERE.glob("*.py"):
        shutil.copy(file, folder)
    metadata = folder / "acme_faked-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-faked\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[fairlead.platforms]\nfaked = faked_devices\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("FAIRLEAD_PLUGINS", "faked")
        yield


@pytest.fixture
def interpreted_kernels() -> None:
    """tests/conftest.py asks for the interpreter where there is no accelerator."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip(
            "the fake device's tensors are the host's, and Triton would compile for the accelerator of this one"
        )


@pytest.mark.usefixtures("_faked")
@pytest.mark.parametrize("name", NAMES)
def test_the_device_code_passes_the_contract_tier_on_a_fake_device(name: str) -> None:
    with Kit(name, tiers=("contract",)) as kit:
        results = conform(kit)
    assert [(r.name, r.message) for r in results if r.status == "failed"] == []
    assert len(results) > 18
    assert {r.name for r in results} >= {"graph runner", "streams and events", "allocator: pools go and come back"}


@pytest.mark.usefixtures("_faked")
def test_an_engine_on_a_fake_device_gives_the_references_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interpreted_kernels: None
) -> None:
    """The same model code, scheduler and sampler: only what the platform puts in differs."""
    monkeypatch.setenv("FAIRLEAD_PLUGINS", "faked,cpu")
    monkeypatch.setenv("FAKED_GRAPHS", "0")
    model = str(write_tiny_llama(tmp_path))
    prompts = [{"prompt_token_ids": list(range(3, 3 + n))} for n in (1, 9)]
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    tokens = {}
    for platform, backend in (("cpu", "reference"), ("cuda", None)):
        llm = LLM(
            model,
            platform=platform,
            attention_backend=backend,
            dtype="float32",
            max_num_batched_tokens=8,
            num_blocks=64,
            skip_tokenizer_init=True,
        )
        assert llm.engine.info.attention_backend == (backend or "triton")
        tokens[platform] = [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params)]
        assert llm.engine.info.platform == platform
    assert tokens["cuda"] == tokens["cpu"]


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", "from fairlead_server.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@functools.cache
def listing() -> str:
    return run("platforms").stdout


def has_device(name: str) -> bool:
    return REASONS[name] not in listing()


def test_a_machine_without_devices_says_why_of_each() -> None:
    lines = {line.split()[0]: line for line in listing().splitlines()[1:]}
    for name in NAMES:
        if "unavailable" in lines[name]:
            assert f"fairlead-{name} 0.1.0" in lines[name]
        else:
            assert "available" in lines[name]
    assert "available" in lines["cpu"]


def test_a_server_is_refused_by_name_and_nothing_takes_its_place() -> None:
    if has_device("cuda"):
        pytest.skip("this machine has a device of cuda")
    done = run("serve", "demo", "--platform", "cuda")
    assert done.returncode != 0
    assert f"platform 'cuda' (fairlead-cuda 0.1.0) is unavailable: {REASONS['cuda']}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_so_is_an_engine(name: str) -> None:
    if has_device(name):
        pytest.skip(f"this machine has a device of {name}")
    reason = re.escape(f"platform '{name}' (fairlead-{name} 0.1.0) is unavailable: {REASONS[name]}")
    with pytest.raises(PlatformUnavailableError, match=reason):
        choose(PlatformConfig(platform=name))


@pytest.mark.parametrize("name", NAMES[:1])
def test_the_kit_examines_what_needs_no_device(name: str) -> None:
    if has_device(name):
        pytest.skip(f"this machine has a device of {name}")
    done = run("conform", "--platform", name, "--tier", "contract")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "registration imports no torch" in done.stdout
    assert f"unsupported: no device here: {REASONS[name]}" in done.stdout
    assert f"{name} conforms to platform contract 1.0: 3 supported, 0 fall back to" in done.stdout


def test_the_other_tiers_need_a_device() -> None:
    if has_device("cuda"):
        pytest.skip("this machine has a device of cuda")
    done = run("conform", "--platform", "cuda", "--tier", "contract", "--tier", "model")
    assert done.returncode == 1
    assert "FAILED: platform 'cuda' (fairlead-cuda 0.1.0) is unavailable: no NVIDIA driver: " in done.stdout
