"""An encoder's width and kind, from its config.json in a folder, in the hub's cache or on the hub; no weights are read.

transformers retries for minutes when the hub does not answer. Here the hub is asked once, for seconds.
"""

from __future__ import annotations

import json
import re
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from threading import Thread
from typing import NamedTuple

from infra.errors import CheckpointError, PixnerdError, SettingsError
from training.encoders import FORMAT

SECONDS = 8.0  # for all requests to the hub together
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_CONFIG = "config.json"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


class Known(NamedTuple):
    width: int  # of its features
    patch_size: int | None  # None: it encodes no images


@cache
def known(source: str) -> Known:
    """The encoder that `source` names: a folder, or a model of the hub such as Qwen/Qwen3-1.7B."""
    return _read(source, config_of(source))


def config_of(source: str) -> Path:
    """The config.json of an encoder, fetched from the hub if that is where it lies."""
    folder = Path(source)
    if folder.is_dir():
        if not any((folder / name).is_file() for name in _WEIGHTS):
            raise CheckpointError(f"the folder {folder} holds no model.safetensors", remedy=FORMAT)
        return folder / _CONFIG
    if not _HUB_NAME.fullmatch(source):
        raise SettingsError(f"there is no folder {source}", remedy=FORMAT)
    return _of_hub(source)


def _of_hub(name: str) -> Path:
    from huggingface_hub import constants, try_to_load_from_cache

    config = try_to_load_from_cache(name, _CONFIG)
    if isinstance(config, str) and any(isinstance(try_to_load_from_cache(name, file), str) for file in _WEIGHTS):
        return Path(config)
    if constants.is_offline_mode():
        raise CheckpointError(
            f"{name} is not in this machine's cache, and HF_HUB_OFFLINE forbids to ask the hub",
            remedy="fetch it before, or name a folder that holds it",
        )
    config_path: Future[str] = Future()
    # A daemon thread: a name server or hub that hangs must not keep the command from ending.
    Thread(target=_download_config, args=(name, config_path), name="hub", daemon=True).start()
    try:
        return Path(config_path.result(SECONDS))
    except PixnerdError:
        raise
    except TimeoutError:
        raise _unreachable(f"no answer within {SECONDS:g} s") from None
    except Exception as error:  # the hub's library passes on the errors of whichever HTTP client it uses
        raise _unreachable((str(error).strip() or type(error).__name__).splitlines()[0][:200]) from error


def _download_config(name: str, config_path: Future[str]) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    try:
        get_hf_file_metadata(hf_hub_url(name, _CONFIG), timeout=SECONDS)  # unlike the download, this does not retry
        config_path.set_result(hf_hub_download(name, _CONFIG))
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
