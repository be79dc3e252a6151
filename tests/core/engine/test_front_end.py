"""What a model's own files set for its requests."""

import json
from pathlib import Path

import pytest

from fairlead.config import EngineConfig
from fairlead.engine.front_end import FrontEnd
from fairlead.errors import ConfigError
from fairlead.request import SamplingParams
from fairlead.testing.tiny_model import write_tiny_llama


def front_end(model: Path, given: dict[str, object], **settings: object) -> FrontEnd:
    (model / "generation_config.json").write_text(json.dumps(given))
    return FrontEnd.open(EngineConfig.of(model=str(model), skip_tokenizer_init=True, **settings))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_tiny_llama(tmp_path)
    return tmp_path


def test_max_new_tokens_is_a_default_of_the_model(model: Path) -> None:
    found = front_end(model, {"max_new_tokens": 40, "top_k": 5})
    assert found.default_sampling_params == SamplingParams(max_tokens=40, top_k=5)
    assert found.default_max_tokens == 40


def test_without_it_the_default_is_nobodys(model: Path) -> None:
    assert front_end(model, {"top_k": 5}).default_max_tokens is None
    ignored = front_end(model, {"max_new_tokens": 40}, generation_config="fairlead")
    assert (ignored.default_max_tokens, ignored.default_sampling_params) == (None, SamplingParams())


@pytest.mark.parametrize("value", [0, -1, "40", 1.5, True])
def test_a_wrong_one_is_told_before_anything_is_loaded(model: Path, value: object) -> None:
    with pytest.raises(ConfigError, match=r"generation_config\.json: max_tokens must be"):
        front_end(model, {"max_new_tokens": value})
