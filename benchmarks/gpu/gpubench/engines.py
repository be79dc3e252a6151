"""Engines of the models with random weights, and what a step of theirs must move."""

import gc
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fairlead.config import EngineConfig
from fairlead.engine.engine import EngineCore
from fairlead.engine.model_runner import ModelRunner
from fairlead.request import Request
from gpubench.harness import Settings
from gpubench.models import body_params, head_params, kv_bytes_per_token, write_config
from gpubench.synthetic import GREEDY


@contextmanager
def opened(settings: Settings, model: str, **more: Any) -> Iterator[EngineCore]:
    """An engine of a model whose weights are drawn on the device; without a tokenizer and without prefix caching."""
    with tempfile.TemporaryDirectory() as folder:
        directory = write_config(model, Path(folder), is_tiny=settings.is_tiny)
        engine = EngineCore(EngineConfig.of(model=str(directory), **engine_settings(settings), **more))
        try:
            yield engine
        finally:
            engine.close()
            gc.collect()


def engine_settings(settings: Settings) -> dict[str, Any]:
    """Of an EngineConfig."""
    return {
        "platform": settings.platform,
        "dtype": settings.dtype,
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "generation_config": "fairlead",
        "max_model_len": settings.pick(9216, 256),
        "max_num_seqs": settings.pick(256, 16),
        "max_num_batched_tokens": settings.pick(8192, 128),
        "enable_prefix_caching": False,
        **settings.pick({}, {"kv_cache_memory": 8 << 20}),
    }


def runner_of(engine: EngineCore) -> ModelRunner:
    """An engine's own: no public way leads to the model beneath the scheduler."""
    return engine._runner


def requests(num: int, num_prompt_tokens: int, vocab_size: int) -> list[Request]:
    """Random prompts of one length whose outputs end when they are aborted."""
    draw = random.Random(num_prompt_tokens)
    return [
        Request(
            request_id=str(i),
            prompt_token_ids=tuple(draw.randrange(vocab_size) for _ in range(num_prompt_tokens)),
            params=GREEDY,
        )
        for i in range(num)
    ]


def decode_bytes(config: Any, itemsize: int, num_seqs: int, context: int) -> int:
    """What a decode step must move: every weight of the layers and the head once, and the keys and values of all
    sequences. (Of the embedding it reads a row a sequence; activations are small beside this.)"""
    weights = (body_params(config) + head_params(config)) * itemsize
    return weights + num_seqs * context * kv_bytes_per_token(config, itemsize)
