"""`fairlead doctor`: what this machine offers, what is wrong with it, and what to do about it. Imports no torch."""

import importlib.metadata
import json
import os
import platform as system
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from fairlead.errors import one_line
from fairlead.plugins import PlatformRecord, discover
from fairlead_server.host import Host

OK, WARNING, PROBLEM = "ok", "warning", "problem"

MIB, GIB = 2**20, 2**30
MIN_MEMORY = GIB // 2  # the engine with the embedded model takes about this much
MIN_SHARED, SMALL_SHARED = 16 * MIB, 256 * MIB  # containers often have 64 MiB, too little for collectives
MIN_FILES, FEW_FILES = 256, 4096  # a server needs one per connection
MIN_DISK, LITTLE_DISK = 100 * MIB, 5 * GIB

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "huggingface-hub", "pluggy", "fastapi")
INSTRUCTION_SETS = re.compile(
    r"avx2|avx512(f|_bf16|_vnni|_fp16)|amx_(tile|bf16|int8)|asimd(dp)?|sve2?|i8mm|bf16|vxe?2?"
)
SECRET = re.compile("TOKEN|KEY|SECRET|PASSWORD", re.IGNORECASE)
SHOWN = re.compile("^(FAIRLEAD_|HF_|HUGGING_FACE_|OMP_|MKL_|GOMP_|TORCH_|PYTORCH_|LD_PRELOAD$)")
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report. `remedy` is there unless all is well."""

    name: str
    status: str
    found: str
    remedy: str | None = None


def examine(host: Host | None = None, environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """All findings; an examination that fails is a finding itself."""
    host = host or Host()
    findings: list[Finding] = []
    examinations: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("versions", _versions),
        ("platforms", lambda: _platforms(discover())),
        ("processor", lambda: _processor(host, environment)),
        ("memory", lambda: _memory(host)),
        ("shared memory", lambda: _shared_memory(host)),
        ("limits", lambda: _limits(host)),
        ("disk", lambda: _disk(environment)),
        ("environment", lambda: _environment(environment)),
    ]
    for name, look in examinations:
        try:
            findings += look()
        except Exception as error:  # a doctor who faints helps nobody: the rest is still worth knowing
            findings.append(Finding(name=name, status=WARNING, found=f"not examined: {one_line(error)}"))
    return findings


def is_healthy(findings: list[Finding]) -> bool:
    """Whether there is no problem; warnings are none."""
    return all(finding.status != PROBLEM for finding in findings)


def as_text(findings: list[Finding]) -> str:
    """One line per finding, its remedy below it, and a verdict."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:<8} {finding.name:<{width}}  {finding.found}")
        if finding.remedy is not None:
            lines.append(f"{'':<8} {'':<{width}}  -> {finding.remedy}")
    problems = [finding.name for finding in findings if finding.status == PROBLEM]
    lines.append(f"{len(problems)} problems: {', '.join(problems)}" if problems else "healthy")
    return "\n".join(lines)


def as_json(findings: list[Finding]) -> str:
    """{"healthy": ..., "findings": [...]}."""
    return json.dumps({"healthy": is_healthy(findings), "findings": [asdict(f) for f in findings]}, indent=2)


def _versions() -> Iterator[Finding]:
    yield Finding(name="system", status=OK, found=f"{system.system()} {system.release()}, {system.machine()}")
    yield Finding(name="python", status=OK, found=f"{system.python_version()} ({sys.executable})")
    missing = []
    for name in ("fairlead", *PACKAGES):
        try:
            yield Finding(name=name, status=OK, found=importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    for name in missing:
        remedy = f"pip install {name}"
        yield Finding(name=name, status=PROBLEM, found="not installed, but needed", remedy=remedy)


def _platforms(records: list[PlatformRecord]) -> Iterator[Finding]:
    for record in records:
        name, owner = f"platform {record.name}", f"{record.distribution} {record.version}"
        if record.status == "available":
            devices = ", ".join(f"{d.name} ({d.description}, {_size(d.memory_bytes)})" for d in record.devices)
            yield Finding(name=name, status=OK, found=f"available, {owner}: {devices}")
        elif record.status == "broken":
            remedy = f"repair, upgrade or uninstall {record.distribution}"
            yield Finding(name=name, status=PROBLEM, found=f"refused, {owner}: {record.reason}", remedy=remedy)
        else:
            yield Finding(name=name, status=OK, found=f"not there, {owner}: {record.reason}")
        yield from _complaints(record, name)
    if not any(record.status == "available" for record in records):
        remedy = "install a platform, for example: pip install 'fairlead[cpu]'"
        yield Finding(name="platforms", status=PROBLEM, found="none can be used here", remedy=remedy)


def _complaints(record: PlatformRecord, name: str) -> Iterator[Finding]:
    """What the platform itself has to say about its driver and the torch that is installed for it."""
    if record.diagnose is None:
        return
    try:
        complaints = record.diagnose()
    except Exception as error:
        remedy = f"this is a fault of {record.distribution} {record.version}"
        yield Finding(name=name, status=PROBLEM, found=f"diagnose() raised {one_line(error)}", remedy=remedy)
        return
    for complaint in complaints:
        yield Finding(
            name=name, status=PROBLEM, found=complaint, remedy=f"see the documentation of {record.distribution}"
        )


def _processor(host: Host, environment: Mapping[str, str]) -> Iterator[Finding]:
    model, flags = host.processor()
    sets = [flag for flag in flags if INSTRUCTION_SETS.fullmatch(flag)]
    yield Finding(name="processor", status=OK, found=model or system.processor() or system.machine())
    yield Finding(name="instruction sets", status=OK, found=" ".join(sets) or "none that matter here")
    cores = host.cores()
    parts = [f"{cores.usable:g} usable of {cores.online}"]
    if cores.affinity is not None:
        parts.append(f"affinity {cores.affinity}")
    if cores.quota is not None:
        parts.append(f"control group quota {cores.quota:g}")
    if cores.num_nodes > 1:
        parts.append(f"{cores.num_nodes} memory nodes")
    yield Finding(name="cores", status=OK, found=", ".join(parts))
    threads = environment.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) > max(cores.usable, 1):
        yield Finding(
            name="threads",
            status=WARNING,
            found=f"OMP_NUM_THREADS is {threads}, but only {cores.usable:g} cores are usable",
            remedy=f"set OMP_NUM_THREADS to at most {max(int(cores.usable), 1)}",
        )


def _memory(host: Host) -> Iterator[Finding]:
    memory = host.memory()
    found = f"{_size(memory.free_bytes)} free of {_size(memory.total_bytes)}"
    if memory.limit_bytes is not None:
        found += f" (control group limit {_size(memory.limit_bytes)})"
    remedy = f"free some: the engine needs about {_size(MIN_MEMORY)} besides the model"
    yield _judged("memory", found, is_problem=memory.free_bytes < MIN_MEMORY, remedy=remedy)


def _shared_memory(host: Host) -> Iterator[Finding]:
    folder = host.root / "dev" / "shm"
    if not folder.is_dir():
        yield Finding(name="/dev/shm", status=WARNING, found="missing", remedy="mount it; collectives need it")
        return
    usage = shutil.disk_usage(folder)
    found = f"{_size(usage.free)} free of {_size(usage.total)}"
    remedy = "give the container more (such as --shm-size=1g), or empty it"
    if not os.access(folder, os.W_OK):
        yield Finding(name="/dev/shm", status=PROBLEM, found="not writable", remedy="chmod 1777 /dev/shm")
        return
    yield _judged(
        "/dev/shm",
        found,
        is_problem=usage.free < MIN_SHARED,
        is_warning=usage.free < SMALL_SHARED,
        remedy=remedy,
    )


def _limits(host: Host) -> Iterator[Finding]:
    for name, limit in host.limits().items():
        found = "unlimited" if limit.soft is None else f"{limit.soft} (up to {limit.hard or 'unlimited'})"
        few = name == "open files" and limit.soft is not None
        yield _judged(
            f"ulimit {name}",
            found,
            is_problem=few and (limit.soft or 0) < MIN_FILES,
            is_warning=few and (limit.soft or 0) < FEW_FILES,
            remedy=f"ulimit -n {FEW_FILES} in the shell that starts the server",
        )


def _disk(environment: Mapping[str, str]) -> Iterator[Finding]:
    home = Path(environment.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(environment.get("HF_HUB_CACHE") or home / "hub")
    for name, folder in (("model cache", cache), ("temporary files", Path(tempfile.gettempdir()))):
        there = next((p for p in (folder, *folder.parents) if p.is_dir()), None)
        if there is None or not os.access(there, os.W_OK):
            remedy = f"make {folder} writable" + (", or set HF_HUB_CACHE" if name == "model cache" else "")
            yield Finding(name=name, status=PROBLEM, found=f"{folder} cannot be written", remedy=remedy)
            continue
        usage = shutil.disk_usage(there)
        yield _judged(
            name,
            f"{folder}: {_size(usage.free)} free of {_size(usage.total)}",
            is_problem=usage.free < MIN_DISK,
            is_warning=usage.free < LITTLE_DISK and name == "model cache",
            remedy=f"free some of the disk of {folder}",
        )


def _environment(environment: Mapping[str, str]) -> Iterator[Finding]:
    token = next((name for name in TOKENS if environment.get(name)), None)
    file = Path(environment.get("HF_HOME") or Path.home() / ".cache" / "huggingface") / "token"
    if token is None and file.is_file():
        token = str(file)
    found = "none; only public models can be downloaded" if token is None else f"set by {token} (not shown)"
    yield Finding(name="Hugging Face token", status=OK, found=found)
    for name in sorted(environment):
        if SHOWN.match(name):
            value = "set (not shown)" if SECRET.search(name) else environment[name]
            yield Finding(name=name, status=OK, found=value)


def _judged(name: str, found: str, *, remedy: str, is_problem: bool, is_warning: bool = False) -> Finding:
    status = PROBLEM if is_problem else WARNING if is_warning else OK
    return Finding(name=name, status=status, found=found, remedy=None if status == OK else remedy)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.0f} MiB"
