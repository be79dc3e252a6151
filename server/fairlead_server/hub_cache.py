"""`fairlead pull`, `list` and `rm`: the Hugging Face cache, through huggingface_hub."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fairlead.checkpoint import download
from fairlead.config import ModelConfig
from fairlead.errors import ConfigError, ModelNotFoundError

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo


def pull(model: str, *, revision: str | None, cache_dir: str | None) -> int:
    """Downloads what serving the model needs, and prints where it lies. Raises ModelNotFoundError."""
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise ConfigError(f"{model!r:.200} is no Hugging Face id; give org/name")
    print(download(ModelConfig(model=model, revision=revision, download_dir=cache_dir)))
    return 0


def show(*, cache_dir: str | None) -> int:
    """Prints the models of the cache with their sizes."""
    found = _models(cache_dir)
    if not found:
        print("no model is in the cache; `fairlead pull org/name` gets one", file=sys.stderr)
    width = max((len(repo.repo_id) for repo in found), default=0)
    for repo in found:
        print(f"{repo.repo_id.ljust(width)}  {repo.size_on_disk / 2**30:8.2f} GiB  {repo.repo_path}")
    return 0


def remove(models: list[str], *, cache_dir: str | None) -> int:
    """Deletes models from the cache; none of them if one is not there. Raises ModelNotFoundError."""
    from huggingface_hub import scan_cache_dir

    found = {repo.repo_id: repo for repo in _models(cache_dir)}
    for model in models:
        if model not in found:
            raise ModelNotFoundError(f"{model!r:.200} is not in the cache; `fairlead list` shows what is")
    revisions = [revision.commit_hash for model in models for revision in found[model].revisions]
    deletion = scan_cache_dir(cache_dir).delete_revisions(*revisions)
    deletion.execute()
    print(f"freed {deletion.expected_freed_size / 2**30:.2f} GiB", file=sys.stderr)
    return 0


def _models(cache_dir: str | None) -> "list[CachedRepoInfo]":
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.constants import HF_HUB_CACHE

    if not Path(cache_dir or HF_HUB_CACHE).is_dir():
        return []
    repos = scan_cache_dir(cache_dir).repos
    return sorted((repo for repo in repos if repo.repo_type == "model"), key=lambda repo: repo.repo_id)
