"""`fairlead doctor`: each fault is a finding with a remedy, secrets stay secret, and the exit status says it all."""

import json
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from fairlead.interface import Device
from fairlead.plugins import PlatformRecord
from fairlead_server import doctor
from fairlead_server.doctor import OK, PROBLEM, WARNING, Finding
from fairlead_server.host import Cores, Host, HostMemory, Limit

MIB, GIB = 2**20, 2**30
DEVICE = Device(name="acme:0", description="Acme One", memory_bytes=GIB)
USAGE = namedtuple("USAGE", "total used free")


def record(status: str, reason: str | None = None, **more: object) -> PlatformRecord:
    devices = (DEVICE,) if status == "available" else ()
    return PlatformRecord(
        name="acme",
        distribution="fairlead-acme",
        version="1.2",
        status=status,
        reason=reason,
        devices=devices,
        **more,  # type: ignore[arg-type]
    )


class FakeHost(Host):
    """A host of 8 cores and 8 GiB in the best of health, but for what a test says."""

    def __init__(self, root: Path, *, free: int = 4 * GIB, files: int = 65536, usable: int = 8) -> None:
        super().__init__(root)
        self._free, self._files, self._usable = free, files, usable

    def cores(self) -> Cores:
        return Cores(online=8, affinity=self._usable, quota=None, num_nodes=1)

    def memory(self) -> HostMemory:
        return HostMemory(total_bytes=8 * GIB, free_bytes=self._free, limit_bytes=None)

    def limits(self) -> dict[str, Limit]:
        return {"open files": Limit(soft=self._files, hard=None), "locked bytes": Limit(soft=1, hard=1)}


@pytest.fixture(autouse=True)
def healthy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dev" / "shm").mkdir(parents=True)
    monkeypatch.setattr(doctor, "discover", lambda: [record("available")])
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: USAGE(64 * GIB, 0, 32 * GIB))


def examine(host: Host, **environment: str) -> dict[str, Finding]:
    return {finding.name: finding for finding in doctor.examine(host, {"HF_HOME": str(host.root), **environment})}


def test_a_healthy_machine(tmp_path: Path) -> None:
    findings = examine(FakeHost(tmp_path))
    assert {finding.status for finding in findings.values()} == {OK}
    assert {"python", "torch", "fairlead", "platform acme", "cores", "memory", "/dev/shm", "model cache"} <= set(
        findings
    )
    assert "acme:0 (Acme One, 1.0 GiB)" in findings["platform acme"].found
    assert all(finding.remedy is None for finding in findings.values())
    text = doctor.as_text(list(findings.values()))
    assert text.endswith("\nhealthy")


@pytest.mark.parametrize(
    ("host", "name", "status", "found"),
    [
        ({"free": GIB // 4}, "memory", PROBLEM, "256 MiB free of 8.0 GiB"),
        ({"files": 1024}, "ulimit open files", WARNING, "1024 (up to unlimited)"),
        ({"files": 64}, "ulimit open files", PROBLEM, "64 (up to unlimited)"),
        ({"usable": 2}, "threads", WARNING, "OMP_NUM_THREADS is 4, but only 2 cores are usable"),
    ],
)
def test_what_is_scarce_is_told(tmp_path: Path, host: dict[str, int], name: str, status: str, found: str) -> None:
    finding = examine(FakeHost(tmp_path, **host), OMP_NUM_THREADS="4")[name]
    assert (finding.status, finding.found) == (status, found)
    assert finding.remedy


@pytest.mark.parametrize(("free", "status"), [(MIB, PROBLEM), (64 * MIB, WARNING), (GIB, OK)])
def test_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, status: str) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: USAGE(2 * GIB, 0, free))
    assert examine(FakeHost(tmp_path))["/dev/shm"].status == status


def test_no_shared_memory_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "dev" / "shm").rmdir()
    assert examine(FakeHost(tmp_path))["/dev/shm"].status == WARNING


@pytest.mark.parametrize(("free", "status"), [(MIB, PROBLEM), (GIB, WARNING), (32 * GIB, OK)])
def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, status: str) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: USAGE(64 * GIB, 0, free))
    finding = examine(FakeHost(tmp_path), HF_HUB_CACHE=str(tmp_path / "not" / "made" / "yet"))["model cache"]
    assert (finding.status, str(tmp_path / "not") in finding.found) == (status, True)


@pytest.mark.parametrize(
    ("records", "name", "status", "found"),
    [
        (
            [record("broken", "ImportError: libacme")],
            "platform acme",
            PROBLEM,
            "refused, fairlead-acme 1.2: ImportError",
        ),
        ([record("unavailable", "no /dev/acme0")], "platform acme", OK, "not there, fairlead-acme 1.2: no /dev/acme0"),
        ([record("unavailable", "no /dev/acme0")], "platforms", PROBLEM, "none can be used here"),
        ([], "platforms", PROBLEM, "none can be used here"),
    ],
)
def test_platforms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: list[PlatformRecord], name: str, status: str, found: str
) -> None:
    monkeypatch.setattr(doctor, "discover", lambda: records)
    finding = examine(FakeHost(tmp_path))[name]
    assert finding.status == status
    assert finding.found.startswith(found)


@pytest.mark.parametrize("status", ["available", "unavailable"])
def test_a_platform_tells_of_a_mismatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str) -> None:
    mismatch = "the driver is 7.1, but torch 2.13 was built for 8.0; install driver 8"
    monkeypatch.setattr(doctor, "discover", lambda: [record(status, "no device", diagnose=lambda: (mismatch,))])
    finding = examine(FakeHost(tmp_path))["platform acme"]
    assert (finding.status, finding.found) == (PROBLEM, mismatch)


def test_a_diagnosis_that_raises_is_the_plugins_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diagnose() -> tuple[str, ...]:
        raise OSError("libacme")

    monkeypatch.setattr(doctor, "discover", lambda: [record("available", diagnose=diagnose)])
    finding = examine(FakeHost(tmp_path))["platform acme"]
    assert (finding.status, finding.found) == (PROBLEM, "diagnose() raised OSError: libacme")
    assert finding.remedy == "this is a fault of fairlead-acme 1.2"


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("no-such-package",))
    finding = examine(FakeHost(tmp_path))["no-such-package"]
    assert (finding.status, finding.remedy) == (PROBLEM, "pip install no-such-package")


def test_an_examination_that_fails_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unreadable(FakeHost):
        def memory(self) -> HostMemory:
            raise ValueError("garbage in /proc")

    findings = examine(Unreadable(tmp_path))
    assert findings["memory"].found == "not examined: ValueError: garbage in /proc"
    assert findings["memory"].status == WARNING
    assert "model cache" in findings


def test_secrets_are_not_shown(tmp_path: Path) -> None:
    secrets = {"HF_TOKEN": "hf_abcdef", "FAIRLEAD_API_KEY": "sk-123", "HF_HUB_OFFLINE": "1"}
    findings = examine(FakeHost(tmp_path), **secrets)
    assert findings["Hugging Face token"].found == "set by HF_TOKEN (not shown)"
    assert findings["HF_HUB_OFFLINE"].found == "1"
    for text in (doctor.as_text(list(findings.values())), doctor.as_json(list(findings.values()))):
        assert "hf_abcdef" not in text
        assert "sk-123" not in text


def test_a_token_in_a_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hf_abcdef")
    assert examine(FakeHost(tmp_path))["Hugging Face token"].found == f"set by {tmp_path / 'token'} (not shown)"


@pytest.mark.parametrize("command", ["doctor", "collect-env"])
def test_the_command_prints_json_and_imports_no_torch(command: str) -> None:
    code = (
        "import sys, fairlead_server.cli as cli\n"
        "try:\n"
        f"    cli.main(['{command}', '--json'])\n"
        "finally:\n"
        "    print('torch' in sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == "False\n"
    report = json.loads(done.stdout)
    assert done.returncode == (0 if report["healthy"] else 1)
    names = {finding["name"] for finding in report["findings"]}
    assert {"platform cpu", "cores", "instruction sets", "/dev/shm"} <= names


def test_a_problem_ends_with_1() -> None:
    code = "import fairlead_server.cli as cli; cli.main(['doctor'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={"FAIRLEAD_PLUGINS": "", "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 1
    assert "platforms" in done.stdout.splitlines()[-1]
