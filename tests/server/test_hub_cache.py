"""`fairlead list`, `rm` and `pull` on a cache in the layout of huggingface_hub, offline."""

import hashlib
from pathlib import Path

import pytest

from fairlead_server import cli


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    for name in ("org/one", "org/two"):
        commit = hashlib.sha1(name.encode()).hexdigest()
        repo = tmp_path / f"models--{name.replace('/', '--')}"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text(commit)
        (repo / "blobs").mkdir()
        (repo / "blobs" / "b1").write_bytes(b"x" * 1000)
        snapshot = repo / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").symlink_to("../../blobs/b1")
    return tmp_path


def invoke(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as raised:
        cli.main(list(arguments))
    captured = capsys.readouterr()
    return raised.value.code, captured.out, captured.err


def test_models_are_listed_and_removed(capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    at = ("--download-dir", str(cache))
    status, out, _ = invoke(capsys, "list", *at)
    assert (status, [line.split()[0] for line in out.splitlines()]) == (0, ["org/one", "org/two"])
    status, _, err = invoke(capsys, "rm", "org/one", "org/three", *at)
    assert (status, len(list(cache.glob("models--*")))) == (1, 2)
    assert "'org/three' is not in the cache" in err
    assert invoke(capsys, "rm", "org/one", *at)[0] == 0
    assert [line.split()[0] for line in invoke(capsys, "list", *at)[1].splitlines()] == ["org/two"]


def test_an_empty_or_missing_cache_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        status, out, err = invoke(capsys, "list", "--download-dir", str(folder))
        assert (status, out) == (0, "")
        assert "fairlead pull" in err


def test_what_cannot_be_pulled_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("demo", "./folder", "a/b/c"):
        status, _, err = invoke(capsys, "pull", name)
        assert (status, err.count("\n")) == (2, 1)
        assert "no Hugging Face id" in err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    status, _, err = invoke(capsys, "pull", "org/name", "--download-dir", str(tmp_path))
    assert (status, err.count("\n")) == (1, 1)


def test_what_is_pulled_is_there_afterwards(
    capsys: pytest.CaptureFixture[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    status, out, _ = invoke(capsys, "pull", "org/one", "--download-dir", str(cache))
    assert status == 0
    assert (Path(out.strip()) / "config.json").is_file()
