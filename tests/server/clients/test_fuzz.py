"""schemathesis, in an environment of its own, over the document that the server publishes; in the full run."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def test_no_fuzzed_request_gets_an_undocumented_answer(environment: Callable[..., Path], fake_server: Any) -> None:
    python = environment(["schemathesis"], with_ours=False)
    url = f"{fake_server.url}/openapi.json"
    phases = "examples,coverage,fuzzing"  # no answer leads to another request, so none are made up of several
    arguments = ["--checks", CHECKS, "--phases", phases, "--max-examples", "2000", "--seed", "1", "--no-color"]
    done = subprocess.run(
        [str(python.with_name("schemathesis")), "run", url, *arguments],
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
        cwd=python.parent,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    num = re.search(r"(\d+) generated", done.stdout)
    assert num is not None, done.stdout[-2000:]
    print(f"{num[1]} requests")
    assert int(num[1]) >= 10_000
    assert fake_server.engine.is_healthy
