"""The offline interface: forms of prompts, order, streaming, defaults, errors, hygiene."""

import itertools
import subprocess
import sys
from collections.abc import Iterator

import pytest

from fairlead import LLM, SamplingParams
from fairlead.errors import ConfigError, ContextLengthError, RequestError
from fairlead.request import SequenceDelta

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    llm = LLM("demo", dtype="float32", max_num_seqs=8, max_model_len=256)
    yield llm
    llm.engine.scheduler.check_integrity()
    assert llm.engine.stats().kv_cache_usage == 0
    llm.close()


def test_every_form_of_a_prompt_gives_the_same_tokens(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("ROMEO:")
    forms = ["ROMEO:", {"prompt": "ROMEO:"}, {"prompt_token_ids": ids}, ids]
    outputs = [llm.generate(form, GREEDY, use_tqdm=False) for form in forms]
    assert all(len(o) == 1 for o in outputs)
    assert len({tuple(o[0].outputs[0].token_ids) for o in outputs}) == 1
    assert outputs[0][0].prompt == "ROMEO:"
    assert list(outputs[2][0].prompt_token_ids) == ids
    together = llm.generate(forms, GREEDY, use_tqdm=False)
    assert [list(o.outputs[0].token_ids) for o in together] == [list(outputs[0][0].outputs[0].token_ids)] * 4


def test_outputs_come_in_input_order_with_their_own_params(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (9, 1, 5)]
    outputs = llm.generate(["A", "B", "C"], params, use_tqdm=False)
    assert [o.prompt for o in outputs] == ["A", "B", "C"]
    assert [len(o.outputs[0].token_ids) for o in outputs] == [9, 1, 5]
    assert all(o.finished and o.outputs[0].finish_reason == "length" for o in outputs)


def test_more_requests_than_seats_all_finish(llm: LLM) -> None:
    prompts = [f"{i}: " for i in range(20)]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    alone = [llm.generate(p, GREEDY, use_tqdm=False)[0] for p in prompts[:3]]
    assert [o.outputs[0].token_ids for o in outputs[:3]] == [o.outputs[0].token_ids for o in alone]


def test_a_stream_grows_to_what_generate_gives(llm: LLM) -> None:
    whole = llm.generate("JULIET:", GREEDY, use_tqdm=False)[0].outputs[0]
    seen = list(llm.generate_stream("JULIET:", GREEDY))
    lengths = [len(o.outputs[0].token_ids) for o in seen]
    assert lengths == sorted(set(lengths))
    assert all(b.outputs[0].text.startswith(a.outputs[0].text) for a, b in itertools.pairwise(seen))
    assert [o.finished for o in seen] == [False] * (len(seen) - 1) + [True]
    assert (seen[-1].outputs[0].text, seen[-1].outputs[0].token_ids) == (whole.text, whole.token_ids)


def test_a_closed_stream_gives_its_blocks_back(llm: LLM) -> None:
    stream = llm.generate_stream("JULIET:", GREEDY)
    next(stream)
    assert llm.engine.stats().kv_cache_usage > 0
    stream.close()
    while llm.engine.has_work:
        assert llm.engine.step() == []
    assert llm.engine.stats().kv_cache_usage == 0


def test_two_streams_and_a_batch_interleave(llm: LLM) -> None:
    wanted = {p: llm.generate(p, GREEDY, use_tqdm=False)[0].outputs[0].text for p in ("ONE", "TWO", "THREE")}
    first, second = llm.generate_stream("ONE", GREEDY), llm.generate_stream("TWO", GREEDY)
    next(first)
    next(second)
    assert llm.generate("THREE", GREEDY, use_tqdm=False)[0].outputs[0].text == wanted["THREE"]
    assert [list(s)[-1].outputs[0].text for s in (first, second)] == [wanted["ONE"], wanted["TWO"]]


def test_n_gives_as_many_continuations_that_share_the_prompt(llm: LLM) -> None:
    params = SamplingParams(n=4, temperature=1.0, max_tokens=10, seed=7, ignore_eos=True, logprobs=1)
    (output,) = llm.generate("The king", params, use_tqdm=False)
    assert [o.index for o in output.outputs] == [0, 1, 2, 3]
    assert len({tuple(o.token_ids) for o in output.outputs}) > 1
    for o in output.outputs:
        assert o.logprobs is not None
        total = sum(step[t].logprob for t, step in zip(o.token_ids, o.logprobs, strict=True))
        assert o.cumulative_logprob == pytest.approx(total)
    (again,) = llm.generate("The king", params, use_tqdm=False)
    assert [o.token_ids for o in again.outputs] == [o.token_ids for o in output.outputs]


def test_a_stop_string_cuts_text_and_is_named(llm: LLM) -> None:
    free = llm.generate("ROMEO:", SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)[0].outputs[0]
    stop = free.text[10:14]
    cut = llm.generate("ROMEO:", SamplingParams(temperature=0, max_tokens=40, stop=stop), use_tqdm=False)[0].outputs[0]
    assert cut.text == free.text[: free.text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert list(cut.token_ids) == list(free.token_ids[: len(cut.token_ids)])


def test_a_second_prompt_reports_cached_tokens_and_a_reset_forgets_them(llm: LLM) -> None:
    prompt = {"prompt_token_ids": [5 + i % 300 for i in range(100)]}
    llm.reset_prefix_cache()
    cold, warm = (llm.generate(prompt, GREEDY, use_tqdm=False)[0] for _ in range(2))
    assert (cold.num_cached_tokens, warm.num_cached_tokens) == (0, 96)
    assert cold.outputs[0].token_ids == warm.outputs[0].token_ids
    llm.reset_prefix_cache()
    assert llm.generate(prompt, GREEDY, use_tqdm=False)[0].num_cached_tokens == 0


def test_chat_renders_the_models_template(llm: LLM) -> None:
    chats = [[{"role": "user", "content": "What is love?"}], [{"role": "user", "content": "Who art thou?"}]]
    outputs = llm.chat(chats, GREEDY, use_tqdm=False)
    assert [o.prompt is not None and c[0]["content"] in o.prompt for o, c in zip(outputs, chats, strict=True)] == [
        True,
        True,
    ]
    (single,) = llm.chat(chats[1], GREEDY, use_tqdm=False)
    assert single.outputs[0].token_ids == outputs[1].outputs[0].token_ids
    assert list(llm.chat_stream(chats[1], GREEDY))[-1].outputs[0].text == single.outputs[0].text


def test_defaults_come_from_the_models_generation_config(llm: LLM) -> None:
    assert llm.get_default_sampling_params().temperature == pytest.approx(0.8)
    plain = LLM("demo", generation_config="vllm", num_blocks=64, max_model_len=64)
    assert plain.get_default_sampling_params() == SamplingParams()


def test_without_a_tokenizer_token_ids_go_in_and_come_out() -> None:
    llm = LLM("demo", skip_tokenizer_init=True, max_model_len=64, num_blocks=8)
    (output,) = llm.generate({"prompt_token_ids": [5, 6]}, SamplingParams(max_tokens=4, detokenize=False))
    assert (len(output.outputs[0].token_ids), output.outputs[0].text) == (4, "")
    with pytest.raises(RequestError, match="token ids"):
        llm.generate("text", use_tqdm=False)


@pytest.mark.parametrize("prompt", [[], {"prompt_token_ids": []}, [-1], [10**6], {"prompt": 3}, 7, [1.5], {}])
def test_bad_prompts_are_refused_and_leave_nothing_behind(llm: LLM, prompt: object) -> None:
    if prompt == []:
        assert llm.generate([], GREEDY) == []
        return
    with pytest.raises(RequestError):
        llm.generate(["fine", prompt], GREEDY, use_tqdm=False)  # type: ignore[list-item]
    with pytest.raises(RequestError):
        llm.generate(prompt, GREEDY, use_tqdm=False)  # type: ignore[arg-type]
    assert not llm.engine.has_work


def test_a_prompt_beyond_the_context_is_refused_in_openais_words(llm: LLM) -> None:
    with pytest.raises(ContextLengthError, match="maximum context length is 256 tokens"):
        llm.generate({"prompt_token_ids": [5] * 256}, GREEDY, use_tqdm=False)
    (output,) = llm.generate({"prompt_token_ids": [5] * 255}, SamplingParams(temperature=0, max_tokens=None))
    assert len(output.outputs[0].token_ids) == 1
    assert output.outputs[0].finish_reason == "length"


def test_mismatched_params_and_unknown_settings_say_so(llm: LLM) -> None:
    with pytest.raises(RequestError, match="2 prompts, but 1"):
        llm.generate(["a", "b"], [GREEDY], use_tqdm=False)
    with pytest.raises(ConfigError, match="did you mean 'max_num_seqs'"):
        LLM("demo", max_num_seq=3)


def test_priorities_change_the_order_and_no_output() -> None:
    llm = LLM("demo", max_model_len=64, max_num_seqs=1, num_blocks=8, scheduling_policy="priority")
    prompts = ["ROMEO:", "JULIET:", "KING:"]
    plain = [llm.generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0].token_ids for prompt in prompts]
    ended: list[str] = []
    step = llm.engine.step

    def watched() -> list[SequenceDelta]:
        deltas = step()
        ended.extend(d.request_id for d in deltas if d.finish_reason is not None)
        return deltas

    llm.engine.step = watched  # type: ignore[method-assign]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False, priority=[2, 1, 0])
    assert [o.outputs[0].token_ids for o in outputs] == plain
    assert ended == [o.request_id for o in reversed(outputs)]
    with pytest.raises(RequestError, match="there are 3 prompts, but 1 priorities"):
        llm.generate(prompts, GREEDY, priority=[1])
    llm.close()


def test_the_offline_path_needs_no_server_package() -> None:
    blocked = ("fastapi", "uvicorn", "typer", "rich", "zmq", "prometheus_client", "starlette", "pydantic")
    code = f"""
import sys
for name in {blocked!r}:
    sys.modules[name] = None
from fairlead import LLM, SamplingParams
llm = LLM("demo", max_model_len=64)
print(llm.generate("A", SamplingParams(max_tokens=2), use_tqdm=False)[0].outputs[0].finish_reason)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "length"), done.stderr
