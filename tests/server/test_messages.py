"""Only our own messages cross the sockets, and they arrive as they were."""

import pickle

import pytest

from fairlead.config import EngineConfig
from fairlead.engine import messages
from fairlead.request import (
    EngineInfo,
    EngineStats,
    FinishReason,
    Request,
    SamplingParams,
    SequenceDelta,
    TokenLogprobs,
)

DELTA = SequenceDelta(
    request_id="a",
    index=1,
    token_ids=(5, 6),
    logprobs=(TokenLogprobs(token_ids=(5, 7), logprobs=(-1.5, float("-inf")), rank=1),),
    prompt_logprobs=(TokenLogprobs(token_ids=(8,), logprobs=(-0.5,), rank=2),),
    finish_reason=FinishReason.STOP,
    stop_reason="end",
)
INFO = EngineInfo(
    model="m",
    platform="p",
    device="d",
    attention_backend="a",
    dtype="float32",
    vocab_size=1,
    max_model_len=2,
    max_num_seqs=3,
    block_size=4,
    num_blocks=5,
    weights_bytes=2**40,
    kv_cache_bytes=0,
)
PARAMS = SamplingParams(
    n=2,
    stop=("x",),
    stop_token_ids=(1,),
    seed=-(2**63),
    logprobs=3,
    prompt_logprobs=0,
    presence_penalty=-0.5,
    repetition_penalty=1.25,
    min_tokens=4,
    logit_bias={7: -3, 9: 0.5},
    allowed_token_ids=(7, 9),
    bad_words=("y",),
    logits_processors=("name",),
)

BEAMS = SamplingParams(use_beam_search=True, temperature=0, best_of=3, length_penalty=0.5, early_stopping="never")


@pytest.mark.parametrize(
    "message",
    [
        messages.Add(Request(request_id="a", prompt_token_ids=(1, 2), params=PARAMS, cache_salt="s")),
        messages.Add(Request(request_id="a", prompt_token_ids=(1,), bad_words_token_ids=((4, 5), (6,)))),
        messages.Add(Request(request_id="a", prompt_token_ids=(1,), params=BEAMS, num_beam_candidates=6)),
        messages.Abort("a"),
        messages.Abort("a", 3),
        messages.Stop(),
    ],
)
def test_messages_to_the_engine_arrive_as_they_were(message: messages.ToEngine) -> None:
    assert messages.decode_to_engine(messages.encode(message)) == message


@pytest.mark.parametrize(
    "message",
    [
        messages.Ready(INFO),
        messages.Step([DELTA], EngineStats(num_steps=3, kv_cache_usage=0.5)),
        messages.Heartbeat(EngineStats()),
        messages.Rejected("a", "RequestError", "no", "prompt"),
        messages.Failed("RuntimeError", "no", "Traceback"),
    ],
)
def test_messages_from_the_engine_arrive_as_they_were(message: messages.FromEngine) -> None:
    assert messages.decode_from_engine(messages.encode(message)) == message


def test_the_startup_message_carries_every_setting() -> None:
    config = EngineConfig.of(model="demo", block_size=16, op_providers=["a=b"], enable_prefix_caching=False)
    startup = messages.Startup(config, "/requests", "/events")
    assert messages.decode_startup(messages.encode(startup)) == startup


def test_a_callable_never_crosses() -> None:
    params = SamplingParams(logits_processors=(print,))
    with pytest.raises(TypeError, match="unsupported"):
        messages.encode(messages.Add(Request(request_id="a", prompt_token_ids=(1,), params=params)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        pickle.dumps({"type": "Stop"}),
        messages.encode(messages.Heartbeat(EngineStats())),
        b"\x81\xa4type\xa5Abort",
    ],
    ids=["nothing", "garbage", "pickle", "other direction", "field missing"],
)
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(messages.ProtocolError):
        messages.decode_to_engine(data)
