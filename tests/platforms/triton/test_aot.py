"""The harness itself: what it reports is what the compilers said."""

import pytest
from aot import SHARED_BYTES, TARGETS, Case, Compiled, compile_cases

KERNEL = "aot_sample:sum_kernel"


def sample(size: int, label: str, num_warps: int = 4) -> Case:
    return Case(
        kernel=KERNEL,
        signature={"x": "*fp32", "o": "*fp32"},
        constexprs={"SIZE": size},
        num_warps=num_warps,
        label=label,
    )


def test_it_compiles_for_every_target() -> None:
    results = compile_cases([(target, sample(512, "")) for target in TARGETS])
    assert {target for target, _ in results} == set(TARGETS) == set(SHARED_BYTES)
    for result in results.values():
        result.check(sample(512, ""))


def test_it_sees_spills_and_errors() -> None:
    spilling, failing = sample(8192, "spills", num_warps=1), sample(500, "fails")
    results = compile_cases([("sm_90", spilling), ("gfx942", failing), ("sm_90", failing)])
    assert results["sm_90", spilling.name].spills > 0
    for target in ("sm_90", "gfx942"):
        assert "power of 2" in (results[target, failing.name].error or "")
    for (_, name), result in results.items():
        with pytest.raises(AssertionError):
            result.check(spilling if name == spilling.name else failing)


def test_too_much_shared_memory_fails() -> None:
    case = sample(512, "")
    fits = Compiled(target="gfx942", name=case.name, shared_bytes=SHARED_BYTES["gfx942"], registers=1)
    fits.check(case)
    with pytest.raises(AssertionError):
        Compiled(target="gfx942", name=case.name, shared_bytes=SHARED_BYTES["gfx942"] + 1, registers=1).check(case)
