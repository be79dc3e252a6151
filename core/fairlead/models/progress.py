"""A bar of the bytes that are loaded: on standard error, and only where that is a terminal.

A server loads its model in another process, which has the server's standard error, so the bar is there as well.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def loading_bar(total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Shows a bar while it is open; what it yields takes the bytes that are done since the last call."""
    if not sys.stderr.isatty():
        yield lambda num_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("Loading weights"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        console.show_cursor(True)  # a process that is killed while it loads could not show it again
        task = progress.add_task("load", total=total_bytes)
        yield lambda num_bytes: progress.advance(task, num_bytes)


@contextmanager
def transformers_bar() -> Iterator[None]:
    """Lets transformers, where it loads a model itself, show its own bar only where ours would be."""
    from transformers.utils import logging

    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    disable: Callable[[], None] = logging.disable_progress_bar
    enable: Callable[[], None] = logging.enable_progress_bar
    disable()
    try:
        yield
    finally:
        enable()
