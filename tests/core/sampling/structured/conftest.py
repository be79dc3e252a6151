"""A tiny random model with the demo's tokenizer, and every grammar library that is installed."""

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import fairlead
from fairlead import LLM
from fairlead.sampling.structured.backend import Vocabulary
from fairlead.testing.tiny_model import write_tiny_llama
from fairlead.tokenization.tokenizer import Tokenizer, load_tokenizer

VOCAB_SIZE = 1024
BACKENDS = ("llguidance", "xgrammar")


@pytest.fixture(scope="session", params=BACKENDS)
def backend_name(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed; pip install fairlead[{name}]")
    return name


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_llama(tmp_path_factory.mktemp("structured"), vocab_size=VOCAB_SIZE, seed=3)
    demo = Path(fairlead.__file__).parent / "demo"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def tokenizer(model_dir: Path) -> Tokenizer:
    return load_tokenizer(model_dir)


@pytest.fixture(scope="session")
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary.of(tokenizer, VOCAB_SIZE, tokenizer.eos_token_ids)


@pytest.fixture(scope="session")
def make_llm(model_dir: Path) -> Callable[..., LLM]:
    def make(backend: str, **settings: object) -> LLM:
        defaults: dict[str, object] = {"max_num_seqs": 64, "max_model_len": 512, "block_size": 16}
        return LLM(str(model_dir), structured_outputs_backend=backend, **{**defaults, **settings})

    return make


@pytest.fixture(scope="session")
def llm(backend_name: str, make_llm: Callable[..., LLM]) -> Iterator[LLM]:
    made = make_llm(backend_name)
    yield made
    made.engine.scheduler.check_integrity()
    assert made.engine.stats().kv_cache_usage == 0
    made.close()
