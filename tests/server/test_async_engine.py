"""AsyncEngine over a fake engine process: streams, aborts, and every way in which the process can end."""

import asyncio
import itertools
import os
import signal
import stat
import subprocess
import sys
import time
import types
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from fairlead import errors
from fairlead.config import EngineConfig
from fairlead.engine import async_engine, connection
from fairlead.engine.async_engine import AsyncEngine
from fairlead.request import FinishReason, RequestOutput, SamplingParams

pytestmark = pytest.mark.usefixtures("fake_engine_process")


def run(work: Callable[[AsyncEngine], Awaitable[None]], **settings: Any) -> None:
    """Runs the work on a fresh engine."""

    async def main() -> None:
        async with started(**settings) as engine:
            await work(engine)

    asyncio.run(main())


@asynccontextmanager
async def started(**settings: Any) -> AsyncIterator[AsyncEngine]:
    engine = await AsyncEngine.start(EngineConfig.of(**{"model": "demo", **settings}))
    try:
        yield engine
    finally:
        await engine.shutdown()


async def last(outputs: AsyncIterator[RequestOutput]) -> RequestOutput:
    found = None
    async for output in outputs:
        found = output
    assert found is not None
    return found


async def idle(engine: AsyncEngine) -> None:
    """Waits until the engine has said that nothing runs."""
    end = time.monotonic() + 5
    while engine.stats.num_requests_running or engine.stats.kv_cache_usage:
        assert time.monotonic() < end, engine.stats
        await asyncio.sleep(0.02)


def test_outputs_are_cumulative_and_end_once() -> None:
    async def work(engine: AsyncEngine) -> None:
        prompt = engine.front_end.encode("ROMEO: But soft")
        outputs = [o async for o in engine.generate(prompt, SamplingParams(max_tokens=40, ignore_eos=True))]
        for before, after in itertools.pairwise(outputs):
            assert after.outputs[0].text.startswith(before.outputs[0].text)
        assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
        assert len(outputs[-1].outputs[0].token_ids) == 40
        assert engine.num_ended[FinishReason.LENGTH] == 1
        await idle(engine)
        assert engine.stats.num_prompt_tokens == len(prompt)
        assert engine.stats.num_generation_tokens == 40

    run(work)


def test_text_and_token_ids_give_the_same_and_a_request_id_is_echoed() -> None:
    async def work(engine: AsyncEngine) -> None:
        params = SamplingParams(max_tokens=5)
        by_text = await last(engine.generate("ROMEO:", params, "mine"))
        by_ids = await last(engine.generate(engine.front_end.encode("ROMEO:"), params, "mine"))
        assert by_text.outputs == by_ids.outputs
        assert (by_text.request_id, by_text.prompt, by_ids.prompt) == ("mine", "ROMEO:", None)

    run(work)


def test_a_hundred_requests_of_one_id_do_not_meet() -> None:
    async def work(engine: AsyncEngine) -> None:
        prompts = [[300 + i, 301 + i] for i in range(100)]
        params = SamplingParams(max_tokens=4, ignore_eos=True)
        outputs = await asyncio.gather(*(last(engine.generate(p, params, "same")) for p in prompts))
        assert [list(o.outputs[0].token_ids) for o in outputs] == [p * 2 for p in prompts]

    run(work)


def test_a_slow_reader_skips_outputs_but_loses_no_token() -> None:
    async def work(engine: AsyncEngine) -> None:
        sizes = []
        async for output in engine.generate([300], SamplingParams(max_tokens=50, ignore_eos=True)):
            sizes.append(len(output.outputs[0].token_ids))
            await asyncio.sleep(0.1)
        assert sizes[-1] == 50
        assert len(sizes) < 20

    run(work)


def test_leaving_the_loop_aborts() -> None:
    async def work(engine: AsyncEngine) -> None:
        stream = engine.generate([300], SamplingParams(max_tokens=200, n=3, ignore_eos=True))
        async for _ in stream:
            break
        await stream.aclose()
        await idle(engine)
        assert engine.num_ended[FinishReason.ABORT] == 3
        assert engine.stats.num_generation_tokens < 600

    run(work)


def test_a_cancelled_reader_aborts() -> None:
    async def work(engine: AsyncEngine) -> None:
        task = asyncio.ensure_future(last(engine.generate([300], SamplingParams(max_tokens=200, ignore_eos=True))))
        await asyncio.sleep(0.1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await idle(engine)
        assert engine.num_ended[FinishReason.ABORT] == 1

    run(work)


def test_a_stop_string_ends_the_sequence_in_the_engine_too() -> None:
    async def work(engine: AsyncEngine) -> None:
        params = SamplingParams(max_tokens=200, stop="soft", ignore_eos=True)
        output = await last(engine.generate("But soft what light ", params))
        assert output.outputs[0].text == "But "
        assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", "soft")
        await idle(engine)
        assert engine.stats.num_generation_tokens < 50

    run(work)


@pytest.mark.parametrize(
    ("prompt", "error"),
    [([], errors.RequestError), ([5000], errors.RequestError), ([300] * 256, errors.ContextLengthError)],
)
def test_a_prompt_that_cannot_run_is_refused_here(prompt: list[int], error: type[Exception]) -> None:
    async def work(engine: AsyncEngine) -> None:
        with pytest.raises(error):
            await last(engine.generate(prompt))
        assert engine.num_ended.total() == 0

    run(work)


def test_what_only_the_engine_can_refuse_comes_back_as_an_error(fake: types.ModuleType) -> None:
    async def work(engine: AsyncEngine) -> None:
        with pytest.raises(errors.RequestError, match="takes no such prompt") as raised:
            await last(engine.generate([fake.REJECT]))
        assert raised.value.param == "prompt"
        await last(engine.generate([300]))

    run(work)


def test_defaults_come_from_the_model_unless_ignored() -> None:
    async def work(engine: AsyncEngine) -> None:
        assert engine.default_sampling_params.temperature == 0.8

    async def ignored(engine: AsyncEngine) -> None:
        assert engine.default_sampling_params == SamplingParams()

    run(work)
    run(ignored, generation_config="fairlead")


def test_a_failing_step_ends_every_request_within_a_second(fake: types.ModuleType) -> None:
    async def work(engine: AsyncEngine) -> None:
        others = [
            asyncio.ensure_future(last(engine.generate([300], SamplingParams(max_tokens=200, ignore_eos=True))))
            for _ in range(5)
        ]
        await asyncio.sleep(0.05)
        start = time.monotonic()
        failing = asyncio.ensure_future(last(engine.generate([fake.RAISE])))
        results = await asyncio.gather(failing, *others, return_exceptions=True)
        assert time.monotonic() - start < 1
        assert {type(r) for r in results} == {errors.EngineDeadError}
        assert "RuntimeError: the fake engine was told to fail" in str(results[0])
        assert not engine.is_healthy
        assert engine.stats.num_requests_running == 0
        assert engine.num_ended[FinishReason.ERROR] == 6
        with pytest.raises(errors.EngineDeadError):
            await last(engine.generate([300]))

    run(work)


def test_a_killed_engine_ends_every_request_within_a_second(fake: types.ModuleType) -> None:
    async def work(engine: AsyncEngine) -> None:
        start = time.monotonic()
        with pytest.raises(errors.EngineDeadError, match="killed by signal 9"):
            await last(engine.generate([fake.DIE]))
        assert time.monotonic() - start < 1
        assert engine.dead.is_set()
        assert not engine.is_healthy

    run(work)


def test_a_hanging_engine_is_unhealthy_and_a_busy_one_is_not(
    fake: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert async_engine.HANG_S < 10
    monkeypatch.setattr(async_engine, "HANG_S", 1.5)
    monkeypatch.setattr(connection, "STOP_S", 0.1)

    async def work(engine: AsyncEngine) -> None:
        busy = asyncio.ensure_future(last(engine.generate([300], SamplingParams(max_tokens=200, ignore_eos=True))))
        await asyncio.sleep(0.5)
        assert engine.is_healthy
        await busy
        await asyncio.sleep(1.6)
        assert engine.is_healthy  # idle, with a heartbeat
        hanging = asyncio.ensure_future(last(engine.generate([fake.HANG])))
        await asyncio.sleep(1.8)
        assert not engine.is_healthy
        hanging.cancel()

    run(work)


@pytest.mark.parametrize(
    ("revision", "error", "message"),
    [
        ("KVCacheMemoryError", errors.KVCacheMemoryError, "the fake engine cannot load"),
        ("UnsupportedModelError", errors.UnsupportedModelError, "the fake engine cannot load"),
        ("PluginContractError", errors.PluginContractError, "plugin 'acme' broke the contract in create"),
        ("Other", errors.EngineDeadError, "the engine could not start: RuntimeError: the fake engine cannot load"),
        ("die", errors.EngineDeadError, "killed by signal 9 while it loaded the model"),
    ],
)
def test_what_loading_raises_is_raised_here(revision: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        run(lambda engine: asyncio.sleep(0), revision=revision)
    assert type(raised.value) is error
    if revision != "die":
        assert "Traceback" in "".join(raised.value.__notes__)


def test_a_missing_model_is_told_without_waiting_for_the_engine() -> None:
    start = time.monotonic()
    with pytest.raises(errors.ModelNotFoundError, match="no model directory"):
        run(lambda engine: asyncio.sleep(0), model="/nowhere", revision="sleep")
    assert time.monotonic() - start < 5


def test_cancelling_the_start_leaves_no_process_and_no_socket(
    short_path: Path, monkeypatch: pytest.MonkeyPatch, children: Callable[[int], set[int]]
) -> None:
    monkeypatch.setattr(connection.tempfile, "tempdir", str(short_path))

    async def main() -> None:
        start = asyncio.ensure_future(AsyncEngine.start(EngineConfig.of(model="demo", revision="sleep")))
        await asyncio.sleep(1)
        before = children(os.getpid())
        start.cancel()
        await asyncio.gather(start, return_exceptions=True)
        assert start.cancelled()
        assert len(before - children(os.getpid())) == 1

    asyncio.run(main())
    assert list(short_path.iterdir()) == []


def test_only_its_owner_can_reach_the_sockets_and_they_go_away(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection.tempfile, "tempdir", str(short_path))

    async def work(engine: AsyncEngine) -> None:
        [folder] = short_path.iterdir()
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
        assert modes == {"requests.sock": 0o600, "events.sock": 0o600}

    run(work)
    assert list(short_path.iterdir()) == []


def test_a_temporary_directory_whose_path_is_too_long_for_sockets_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(connection.tempfile, "tempdir", str(deep))
    with pytest.raises(errors.ConfigError, match="TMPDIR"):
        run(lambda engine: asyncio.sleep(0))
    assert list(deep.iterdir()) == []


def test_shutdown_ends_the_process_and_what_still_runs() -> None:
    async def main() -> None:
        async with started() as engine:
            running = asyncio.ensure_future(
                last(engine.generate([300], SamplingParams(max_tokens=200, ignore_eos=True)))
            )
            await asyncio.sleep(0.1)
        with pytest.raises(errors.EngineDeadError):
            await running
        assert await engine._connection.exited == 0

    asyncio.run(main())


def test_a_signal_to_the_engine_alone_does_not_end_it() -> None:
    async def work(engine: AsyncEngine) -> None:
        os.kill(engine._connection.pid, signal.SIGTERM)
        os.kill(engine._connection.pid, signal.SIGINT)
        await last(engine.generate([300], SamplingParams(max_tokens=4)))

    run(work)


def test_a_fault_on_this_side_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(engine: AsyncEngine) -> None:
        def fail(deltas: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(engine._outputs, "process", fail)
        with pytest.raises(errors.EngineDeadError, match="ZeroDivisionError"):
            await asyncio.wait_for(last(engine.generate([300])), 5)

    run(work)


def test_a_chat_is_rendered_and_long_prompts_are_encoded_off_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_engine, "LONG_TEXT_CHARS", 3)

    async def work(engine: AsyncEngine) -> None:
        chat = await engine.encode_chat([{"role": "user", "content": "Hi"}])
        assert engine.front_end.decode(chat.token_ids).endswith("Hi") or "Hi" in chat.text
        assert await engine.encode("ROMEO:") == engine.front_end.encode("ROMEO:")

    run(work)


def test_without_a_tokenizer_text_is_refused_and_token_ids_run() -> None:
    async def work(engine: AsyncEngine) -> None:
        assert (await last(engine.generate([300], SamplingParams(max_tokens=3)))).outputs[0].text == ""
        with pytest.raises(errors.RequestError, match="without a tokenizer"):
            await last(engine.generate("text"))

    run(work, skip_tokenizer_init=True)


def test_a_chat_template_that_cannot_be_read_is_named() -> None:
    with pytest.raises(errors.ConfigError, match="chat_template"):
        run(lambda engine: asyncio.sleep(0), chat_template="/nowhere.jinja")


def test_this_side_imports_no_torch() -> None:
    code = (
        "import asyncio, sys\n"
        "from fairlead.engine.front_end import FrontEnd\n"
        "from fairlead import AsyncEngine, EngineConfig\n"
        "FrontEnd.open(EngineConfig.of(model='demo')).encode('hello')\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
