"""The bar of the bytes that are loaded: for people at a terminal only."""

import io
import json
import sys
from pathlib import Path

import pytest

from fairlead.checkpoint import Checkpoint
from fairlead.config import EngineConfig, ModelConfig
from fairlead.engine.planner import plan_engine
from fairlead.errors import CheckpointError
from fairlead.models import loader
from fairlead.models.progress import loading_bar
from fairlead.testing.tiny_checkpoint import write_tiny_checkpoint
from fairlead.testing.tiny_model import write_tiny_llama


class Terminal(io.StringIO):
    """Takes escape sequences, and keeps them."""

    def isatty(self) -> bool:
        return True


def use_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Called by the test itself: what a fixture puts in the place of stderr, pytest replaces again."""
    found = Terminal()
    monkeypatch.setattr(sys, "stderr", found)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return found


def test_a_terminal_sees_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = use_terminal(monkeypatch)
    with loading_bar(3 * 2**20) as advance:
        advance(2**20)
        advance(2 * 2**20)
    shown = terminal.getvalue()
    assert "Loading weights" in shown
    assert "3.0/3.0 MiB" in shown


def test_the_cursor_comes_back_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server kills the process that loads; nobody would show the cursor again."""
    terminal = use_terminal(monkeypatch)
    with loading_bar(1):
        shown = terminal.getvalue()
        assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def test_nobody_else_sees_anything(capsys: pytest.CaptureFixture[str]) -> None:
    with loading_bar(100) as advance:
        advance(100)
    assert capsys.readouterr() == ("", "")


def test_nor_of_transformers_where_that_loads(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    write_tiny_checkpoint(tmp_path, "granite")
    was_enabled = logging.is_progress_bar_enabled()
    plan = plan_engine(EngineConfig.of(model=str(tmp_path), num_blocks=40))
    capfd.readouterr()
    loader.load_weights(plan.build_model(), plan.checkpoint, plan.platform.allocator)
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled() == was_enabled


def test_an_index_without_metadata_is_told_in_one_line(tmp_path: Path) -> None:
    """Transformers, which loads this one, cannot do without."""
    write_tiny_checkpoint(tmp_path, "granite")
    names = Checkpoint.open(ModelConfig(model=str(tmp_path))).tensors()
    index = {"weight_map": dict.fromkeys(names, "part.safetensors")}
    (tmp_path / "model.safetensors").rename(tmp_path / "part.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    plan = plan_engine(EngineConfig.of(model=str(tmp_path), num_blocks=40))
    with pytest.raises(CheckpointError, match="transformers cannot load it: KeyError: 'metadata'") as raised:
        loader.load_weights(plan.build_model(), plan.checkpoint, plan.platform.allocator)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("tie", [False, True])
def test_the_bar_ends_at_the_bytes_that_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tie: bool) -> None:
    write_tiny_llama(tmp_path, tie_word_embeddings=tie)
    totals: list[int] = []
    steps: list[int] = []

    class Bar:
        def __init__(self, total_bytes: int) -> None:
            totals.append(total_bytes)

        def __enter__(self) -> object:
            return steps.append

        def __exit__(self, *exception: object) -> None: ...

    monkeypatch.setattr(loader, "loading_bar", Bar)
    plan = plan_engine(EngineConfig.of(model=str(tmp_path), num_blocks=40))
    loader.load_weights(plan.build_model(), plan.checkpoint, plan.platform.allocator)
    stored = Checkpoint.open(ModelConfig(model=str(tmp_path))).tensors().values()
    assert totals == [sum(steps)] == [sum(tensor.num_bytes for tensor in stored)]
    assert len(steps) == len(stored)
