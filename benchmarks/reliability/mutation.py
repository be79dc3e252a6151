"""How many planted bugs the tests of the scheduler and the block manager catch.

`python benchmarks/reliability/mutation.py [--most 400] [--seed 0] [--jobs 1]` changes one place of the package
`fairlead.scheduling` at a time (a comparison, an operator, a constant, a condition, a statement left out), and runs the
scheduler simulation and then the unit tests against it, in a fork of this process. It prints each survivor and, last,
the share that was caught. A survivor is either a bug that no test sees or a change that makes no difference: read it.
"""

import argparse
import ast
import copy
import importlib.abc
import importlib.util
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

import hypothesis  # noqa: F401  (loaded once, before the forks)
import msgspec  # noqa: F401
import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "core" / "fairlead" / "scheduling"
TESTS = ROOT / "tests" / "core" / "scheduling"
MAX_S = 120  # a mutant that runs for longer hangs
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.FloorDiv: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in place of a node, if anything."""
    match node:
        case ast.Compare(ops=[op, *_]) if type(op) in SWAPS:
            changed = copy.deepcopy(node)
            changed.ops[0] = SWAPS[type(op)]()  # type: ignore[call-overload]
            yield changed
        case ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.AugAssign(op=op) if type(op) in SWAPS:
            changed_op = copy.deepcopy(node)
            changed_op.op = SWAPS[type(op)]()  # type: ignore[assignment]
            yield changed_op
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield operand
        case ast.Constant(value=bool() as flag):
            yield ast.Constant(not flag)
        case ast.Constant(value=int() as number):
            yield ast.Constant(number + 1)
        case ast.IfExp(test=test, body=body, orelse=orelse):
            yield ast.IfExp(test, orelse, body)
        case ast.Call(func=ast.Name(id="min" | "max" as name), args=args, keywords=keywords):
            yield ast.Call(ast.Name("max" if name == "min" else "min", ast.Load()), args, keywords)
    match node:
        case ast.If() | ast.While():
            for value in (False,) if isinstance(node, ast.While) else (True, False):
                changed_test = copy.deepcopy(node)
                changed_test.test = ast.Constant(value)
                yield changed_test
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Continue() | ast.Delete():
            yield ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield ast.Pass()


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change: `variant` in place of what stands at a field of `parent`, a node of `tree`."""

    path: Path
    tree: ast.Module
    parent: ast.AST
    field: str
    index: int | None
    variant: ast.AST
    told: str

    def apply(self) -> None:
        """Changes the tree, which the mutants of a file share; only a fork may do it."""
        if self.index is None:
            setattr(self.parent, self.field, self.variant)
        else:
            getattr(self.parent, self.field)[self.index] = self.variant
        ast.fix_missing_locations(self.tree)


def mutants(path: Path) -> Iterator[Mutant]:
    """Every change of a file; assertions, messages, annotations and defaults are left alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for parent, field, index, node in _places(function, ("body",)):
                for variant in variants(node):
                    ast.copy_location(variant, node)
                    line = getattr(node, "lineno", 0)
                    told = f"{path.name}:{line}: {ast.unparse(node)!r} -> {ast.unparse(variant)!r}"
                    yield Mutant(path, tree, parent, field, index, variant, told)


def _places(parent: ast.AST, fields: Sequence[str]) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """(parent, field, index within a list, node) of everything below, functions within functions apart."""
    for field in fields:
        value = getattr(parent, field)
        for index, node in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(node, ast.AST) and not isinstance(node, ast.Assert | ast.FunctionDef | ast.JoinedStr):
                yield parent, field, index if isinstance(value, list) else None, node
                yield from _places(node, [f for f in node._fields if f != "annotation"])


class Mutated(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Imports one file of the package from a changed tree."""

    def __init__(self, path: Path, tree: ast.Module) -> None:
        self.name = f"fairlead.scheduling.{path.stem}"
        self.path, self.tree = path, tree

    def find_spec(self, fullname: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)

    def get_source(self, fullname: str) -> str:
        return ast.unparse(self.tree)

    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = compile(self.tree, str(self.path), "exec")
        return code


def run_tests(path: Path, tree: ast.Module) -> None:
    """In the fork: returns if nothing was noticed, else raises or hangs."""
    sys.meta_path.insert(0, Mutated(path, tree))
    from fairlead.testing.scheduler_simulation import simulate

    for seed in range(4):
        simulate(seed, 2_000)
    files = [str(file) for file in sorted(TESTS.glob("test_*.py")) if file.name != "test_scheduler_machine.py"]
    options = ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    if pytest.main([*options, *files]) != 0:
        raise AssertionError("a unit test failed")
    for seed in range(4, 8):
        simulate(seed, 10_000)


def is_caught(path: Path, tree: ast.Module, mutant: Mutant | None = None) -> bool:
    """Whether the tests fail, or do not end, with this tree, changed, in place of the file."""
    pid = os.fork()
    if pid == 0:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        os.dup2(devnull, 2)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(MAX_S)
        try:
            if mutant is not None:
                mutant.apply()
            run_tests(path, tree)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1] != 0


def main() -> None:
    """Runs a sample of the mutants."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--most", type=int, default=400, help="mutants in the sample; 0 takes all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    os.chdir(ROOT)
    untouched = PACKAGE / "scheduler.py"
    if is_caught(untouched, ast.parse(untouched.read_text(encoding="utf-8"))):
        raise SystemExit("the tests fail without any change; run them first")
    found = [mutant for path in sorted(PACKAGE.glob("*.py")) for mutant in mutants(path)]
    total = len(found)
    if arguments.most:
        found = random.Random(arguments.seed).sample(found, min(arguments.most, total))
    start, num_caught = time.monotonic(), 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for mutant, caught in zip(found, pool.map(lambda m: is_caught(m.path, m.tree, m), found), strict=True):
            num_caught += caught
            if not caught:
                print(f"survived: {mutant.told}", flush=True)
    share = num_caught / max(len(found), 1)
    minutes = (time.monotonic() - start) / 60
    print(f"caught {num_caught} of {len(found)} mutants ({share:.1%}) out of {total}, in {minutes:.1f} minutes")


if __name__ == "__main__":
    main()
