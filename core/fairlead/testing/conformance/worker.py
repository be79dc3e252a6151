"""The process in which the checks run: it gets commands on standard input, and answers on a pipe of its own.

Commands and answers are one line of JSON each. {"list": true} is answered by the checks; {"run": ID} by the result.
When a check does not end in time, this process says where it hangs and ends itself; if it cannot even do that, its
parent ends it. Standard output is the plugin's to write to: it goes to standard error.
"""

import argparse
import contextlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, TextIO

from fairlead import plugins
from fairlead.config import PlatformConfig
from fairlead.errors import FairleadError
from fairlead.testing.conformance import absent
from fairlead.testing.conformance.check import TIERS, Check, Result, failed, hung, run_check


class Worker:
    """Answers commands about one platform."""

    def __init__(self, arguments: argparse.Namespace, answers: TextIO) -> None:
        self._answers = answers
        self._name = arguments.platform
        self._checks: dict[str, Check] = {}
        self._package: str | None = None
        self._lock = threading.Lock()
        self._arguments = arguments

    def serve(self, commands: Iterator[str]) -> None:
        """Until standard input ends."""
        for line in commands:
            command: dict[str, Any] = json.loads(line)
            if "run" in command and not self._checks:
                self._list()
            self._answer(self._list() if "list" in command else asdict(self._run(command["run"])))

    def _list(self) -> dict[str, Any]:
        """The checks, in order; or the one conviction of a platform that has none."""
        listing = Check(tier=TIERS[0], name="discovery", hook="fairlead_platforms", run=lambda: None)  # type: ignore
        with _Watch(self, listing, self._arguments.start_timeout):
            a = self._arguments
            tiers = a.tier or list(TIERS)
            try:
                record = absent.find(a.platform)
                if record is not None:
                    self._checks = {check.id: check for check in absent.checks(record, tiers)}
                    return self._listing()
                for name, device in ((a.platform, a.device), (a.against, None)):
                    if name is not None:
                        plugins.choose(PlatformConfig(platform=name, device=device))
                from fairlead.testing.conformance.suite import all_checks, make_subject  # imports torch

                subject = make_subject(a.platform, a.device, full=a.full)
                self._package = subject.package
                against = None if a.against is None else make_subject(a.against, None, full=a.full)
            except FairleadError as error:
                return {"checks": [], "failed": asdict(failed(TIERS[0], "discovery", str(error)))}
            self._checks = {check.id: check for check in all_checks(subject, tiers, against)}
        return self._listing()

    def _listing(self) -> dict[str, Any]:
        return {"checks": [{"tier": c.tier, "name": c.name} for c in self._checks.values()], "failed": None}

    def _run(self, check_id: str) -> Result:
        check = self._checks[check_id]
        with _Watch(self, check, self._arguments.timeout):
            return run_check(check, self._name, self._package)

    def convict(self, check: Check, thread_id: int, seconds: float) -> None:
        """Called by the watch, on its thread: names the hook, answers, and ends the process."""
        frame = sys._current_frames().get(thread_id)
        self._answer(asdict(hung(check, self._name, self._package, frame, seconds)) | {"ended": True})
        os._exit(1)

    def _answer(self, answer: dict[str, Any]) -> None:
        with self._lock:
            self._answers.write(json.dumps(answer) + "\n")
            self._answers.flush()


class _Watch:
    """Convicts the check if the block does not end in time."""

    def __init__(self, worker: Worker, check: Check, seconds: float) -> None:
        self._timer = threading.Timer(seconds, worker.convict, (check, threading.get_ident(), seconds))
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *error: object) -> None:
        self._timer.cancel()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--platform", required=True)
    parser.add_argument("--device")
    parser.add_argument("--against")
    parser.add_argument("--tier", action="append")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--start-timeout", type=float, required=True)
    parser.add_argument("--timeout", type=float, required=True)
    arguments = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with contextlib.redirect_stdout(sys.stderr):
        Worker(arguments, answers).serve(iter(sys.stdin.readline, ""))


if __name__ == "__main__":
    main()
