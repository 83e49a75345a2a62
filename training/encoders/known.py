"""An encoder's width and kind, from its config.json in a folder, in the hub's cache or on the hub; no weights are read.

transformers retries for minutes when the hub does not answer. Here the hub is asked once, for seconds.
"""

from __future__ import annotations

import json
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from threading import Thread
from typing import NamedTuple

from infra.errors import CheckpointError, PixnerdError, SettingsError
from training.encoders.errors import FORMAT
from training.encoders.hub import WEIGHTS, cached, split

SECONDS = 8.0  # for all requests to the hub together
_CONFIG = "config.json"


class Known(NamedTuple):
    width: int  # of its features
    patch_size: int | None  # None: it encodes no images


@cache
def known(source: str) -> Known:
    """The encoder that `source` names: a folder, or a model of the hub as `training.encoders.hub` reads its name."""
    return _read(source, config_of(source))


def config_of(source: str) -> Path:
    """The config.json of an encoder, fetched from the hub if that is where it lies."""
    folder = Path(source)
    if folder.is_dir():
        if not any((folder / name).is_file() for name in WEIGHTS):
            raise CheckpointError(f"the folder {folder} holds no model.safetensors", remedy=FORMAT)
        return folder / _CONFIG
    return _of_hub(*split(source))


def _of_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import constants

    config = cached(name, revision, _CONFIG)
    if config is not None and any(cached(name, revision, file) for file in WEIGHTS):
        return config
    if constants.is_offline_mode():
        raise CheckpointError(
            f"{name}{_at(revision)} is not in this machine's cache, and HF_HUB_OFFLINE forbids to ask the hub",
            remedy="fetch it before, or name a folder that holds it",
        )
    config_path: Future[str] = Future()
    # A daemon thread: a name server or hub that hangs must not keep the command from ending.
    Thread(target=_download_config, args=(name, revision, config_path), name="hub", daemon=True).start()
    try:
        return Path(config_path.result(SECONDS))
    except PixnerdError:
        raise
    except TimeoutError:
        raise _unreachable(f"no answer within {SECONDS:g} s") from None
    except Exception as error:  # the hub's library passes on the errors of whichever HTTP client it uses
        raise _unreachable((str(error).strip() or type(error).__name__).splitlines()[0][:200]) from error


def _at(revision: str | None) -> str:
    return f"@{revision}" if revision else ""


def _download_config(name: str, revision: str | None, config_path: Future[str]) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        url = hf_hub_url(name, _CONFIG, revision=revision)
        get_hf_file_metadata(url, timeout=SECONDS)  # unlike the download, this does not retry
        config_path.set_result(hf_hub_download(name, _CONFIG, revision=revision))
    except GatedRepoError:
        config_path.set_exception(
            CheckpointError(
                f"the hub shows {name} only to those who have agreed to its terms",
                remedy="agree on its page and set HF_TOKEN, or name another model",
            )
        )
    except RepositoryNotFoundError:
        config_path.set_exception(
            SettingsError(f"the hub has no model {name}", remedy="correct the name; of a private one, set HF_TOKEN")
        )
    except RevisionNotFoundError:
        config_path.set_exception(
            SettingsError(
                f"the hub's {name} has no revision {revision}", remedy="name a branch, a tag or a commit of it"
            )
        )
    except EntryNotFoundError:
        config_path.set_exception(SettingsError(f"the hub's {name} has no {_CONFIG}", remedy=FORMAT))
    except Exception as error:  # noqa: BLE001 - config_path.result() raises it
        config_path.set_exception(error)


def _unreachable(why: str) -> CheckpointError:
    from huggingface_hub import constants

    return CheckpointError(
        f"the hub at {constants.ENDPOINT} cannot be reached ({why})",
        remedy="name a folder that holds the encoder, or run where the hub can be reached",
    )


def _read(source: str, path: Path) -> Known:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        patch = config.get("patch_size")
        return Known(int(config["hidden_size"]), None if patch is None else int(patch))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{source} is no encoder that can be used: its {_CONFIG} tells no hidden_size ({type(error).__name__})",
            remedy=FORMAT,
        ) from None
