"""Encoders of the hub, named `Qwen/Qwen3-1.7B`, or `Qwen/Qwen3-1.7B@REVISION` with a branch, a tag or a commit.

A machine's processes share the hub's cache. The first that lacks an encoder fetches it, and the others wait.
"""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from infra.errors import CheckpointError, SettingsError
from training.encoders.errors import FORMAT, unusable

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_NAME = re.compile(r"([\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?:@([\w-][\w./-]*))?")
_FILES = ["*.json", "*.safetensors", "merges.txt", "vocab.txt", "*.model"]  # nothing that is code or a pickle
_BESIDE = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")  # what is fetched with the weights

Download = Callable[[str, "str | None"], object]  # of a name and a revision, into the hub's cache


def split(source: str) -> tuple[str, str | None]:
    """The name and the revision, which is None if none is named."""
    if (match := _NAME.fullmatch(source)) is None:
        raise SettingsError(f"there is no folder {source}", remedy=FORMAT)
    return match[1], match[2]


def pinned(source: str) -> str:
    """The same with the commit that it means now: ranks that ask at different times must not get different weights."""
    name, revision = split(source)
    if (config := cached(name, revision, "config.json")) is not None:
        return f"{name}@{config.parent.name}"
    from huggingface_hub import HfApi

    try:
        return f"{name}@{HfApi().model_info(name, revision=revision, timeout=8.0).sha}"
    except Exception as error:
        raise unusable(source, error) from error


def folder_of(source: str | Path, download: Download | None = None) -> Path:
    """Where an encoder lies on this machine; of the hub, it is fetched by one process if no process has before."""
    if Path(source).is_dir():
        return Path(source)
    name, revision = split(str(source))
    if (folder := _whole(name, revision)) is not None:
        return folder
    failure: Exception = CheckpointError("it holds no whole model.safetensors", remedy=FORMAT)
    with _alone(name):
        if (folder := _whole(name, revision)) is not None:
            return folder
        try:
            (download or _download)(name, revision)
        except Exception as error:  # noqa: BLE001 - the hub's library passes on the errors of its HTTP client
            failure = error
    if (folder := _whole(name, revision, beside=())) is None:  # some models have nothing beside, or the hub is away
        raise unusable(source, failure) from failure
    return folder


def cached(name: str, revision: str | None, file: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(name, file, revision=revision)
    return Path(path) if isinstance(path, str) else None


def _whole(name: str, revision: str | None, beside: tuple[str, ...] = _BESIDE) -> Path | None:
    """Its folder in the hub's cache, if nothing lacks there; what was killed while it fetched leaves a part."""
    config = cached(name, revision, "config.json")
    if config is None or (beside and not any(cached(name, revision, file) for file in beside)):
        return None
    single, index = (cached(name, revision, file) for file in WEIGHTS)
    if single is None and index is None:
        return None
    parts = set(json.loads(index.read_text("utf-8"))["weight_map"].values()) if single is None and index else set()
    return config.parent if all(cached(name, revision, part) for part in parts) else None


def snapshot(name: str, revision: str | None, patterns: Iterable[str]) -> Path:
    """The folder of a repository's commit, which is called like it, with its files of these patterns.

    The processes of a machine ask one after another, and the first one fetches. It raises what the hub's library does.
    """
    with _alone(name):
        return _download(name, revision, patterns)


def _download(name: str, revision: str | None, patterns: Iterable[str] = _FILES) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))


@contextmanager
def _alone(name: str) -> Iterator[None]:
    """One process of the machine at a time; the lock of one that is killed is free."""
    from huggingface_hub import constants

    path = Path(constants.HF_HUB_CACHE) / ".locks" / f"pixnerd-{name.replace('/', '--')}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
