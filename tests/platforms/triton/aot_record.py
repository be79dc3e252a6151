"""What the compilers said of every case for every target, kept in compiled.json: CI need not ask them again.

An entry counts as long as nothing changed of what it was made from: the sources of the kernel's modules, the case, and
Triton's version. Whoever changes a kernel compiles what that touches, which takes half a second a case:

    python tests/platforms/triton/aot_record.py
"""

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aot import TARGETS, Case, Compiled, compile_cases

RECORD = Path(__file__).with_name("compiled.json")
PACKAGE = "fairlead_triton"


@functools.cache
def sources(module: str) -> dict[str, str]:
    """The text of a module of the package and of those that it imports, by name."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    text = Path(spec.origin).read_text(encoding="utf-8")
    found = {module: text}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith(PACKAGE):
            found |= sources(node.module)
    return found


def key_of(target: str, case: Case) -> str:
    """Stands for all that a result depends on. Bounds are checked anew, so they are left out."""
    what = [target, {**asdict(case), "max_spills": None}, sources(case.kernel.partition(":")[0])]
    text = json.dumps([importlib.metadata.version("triton"), *what], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def read() -> dict[str, dict[str, list[Any]]]:
    """By target and case: the key, then shared bytes, spills and registers."""
    found: dict[str, dict[str, list[Any]]] = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    return found


def recorded(target: str, case: Case) -> Compiled:
    """What was said of a case. Raises AssertionError where it was not asked since the case changed."""
    key, *numbers = read().get(target, {}).get(case.name, [None])
    assert key == key_of(target, case), (
        f"{case.name} has changed since it was compiled for {target}; run python tests/platforms/triton/aot_record.py"
    )
    shared_bytes, spills, registers = numbers
    return Compiled(target=target, name=case.name, shared_bytes=shared_bytes, spills=spills, registers=registers)


def cases_of(target: str) -> list[Case]:
    """Those of all tests."""
    import test_aot_kernels
    import test_attention_aot

    return [*test_aot_kernels.unique(target), *test_attention_aot.cases_of(target)]


def main() -> None:
    """Compiles what has no entry that counts, and writes the file; exits with 1 if a compiler gave up."""
    record: dict[str, dict[str, list[Any]]] = {}
    errors = []
    for target in TARGETS:
        cases = {case.name: (key_of(target, case), case) for case in cases_of(target)}
        old = {
            name: entry
            for name, entry in read().get(target, {}).items()
            if name in cases and entry[0] == cases[name][0] and entry[3]
        }
        results = compile_cases([(target, case) for name, (_, case) in cases.items() if name not in old])
        new = {
            name: [cases[name][0], result.shared_bytes, result.spills, result.registers]
            for (_, name), result in results.items()
            if result.error is None
        }
        errors += [f"{name} for {target}: {result.error}" for (_, name), result in results.items() if result.error]
        seconds = sum(result.seconds for result in results.values())
        print(f"{target}: {len(old)} kept, {len(new)} compiled in {seconds:.0f} s", flush=True)
        record[target] = dict(sorted({**old, **new}.items()))
    parts = [
        f'"{target}": {{\n'
        + ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())
        + "\n}"
        for target, entries in record.items()
    ]
    RECORD.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    sys.exit("\n".join(errors) or 0)


if __name__ == "__main__":
    main()
