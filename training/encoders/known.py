"""What an encoder is, before any of it is loaded: by its config.json in a folder, in the hub's cache, or on the hub.

transformers asks a hub that does not answer again and again, for minutes. Here it is asked once, for seconds.
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

SECONDS = 8.0  # for all that is asked of the hub
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_CONFIG = "config.json"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_REMEDY = "name a folder or hub model of transformers' format: config.json, model.safetensors, tokenizer.json"


class Known(NamedTuple):
    width: int  # of its features
    patch_size: int | None  # of one that looks at images


@cache
def known(source: str) -> Known:
    """Width and kind of the encoder that `source` names, a folder or a model of the hub; or why it cannot be had."""
    if Path(source).is_dir():
        return _read(source, _of_folder(Path(source)))
    if not _HUB_NAME.fullmatch(source):
        raise SettingsError(f"there is no folder {source}", remedy=_REMEDY)
    return _read(source, _of_hub(source))


def _of_folder(folder: Path) -> Path:
    if not any((folder / name).is_file() for name in _WEIGHTS):
        raise CheckpointError(f"the folder {folder} holds no model.safetensors", remedy=_REMEDY)
    return folder / _CONFIG


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
    answer: Future[str] = Future()
    # A thread that nobody waits for: neither a name server nor a server that hangs can hold up the command's end.
    Thread(target=_ask, args=(name, answer), name="hub", daemon=True).start()
    try:
        return Path(answer.result(SECONDS))
    except PixnerdError:
        raise
    except TimeoutError:
        raise _away(f"no answer within {SECONDS:g} s") from None
    except Exception as error:  # the hub's library lets its HTTP client's errors through, whichever client that is
        raise _away(_first_line(error)) from error


def _ask(name: str, answer: Future[str]) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    try:
        get_hf_file_metadata(hf_hub_url(name, _CONFIG), timeout=SECONDS)  # it does not ask twice
        answer.set_result(hf_hub_download(name, _CONFIG))
    except GatedRepoError:
        answer.set_exception(
            CheckpointError(
                f"the hub shows {name} only to those who have agreed to its terms",
                remedy="agree on its page and set HF_TOKEN, or name another model",
            )
        )
    except RepositoryNotFoundError:
        answer.set_exception(
            SettingsError(f"the hub has no model {name}", remedy="correct the name; of a private one, set HF_TOKEN")
        )
    except EntryNotFoundError:
        answer.set_exception(SettingsError(f"the hub's {name} has no {_CONFIG}", remedy=_REMEDY))
    except Exception as error:  # noqa: BLE001 - it is raised where the answer is waited for
        answer.set_exception(error)


def _away(why: str) -> CheckpointError:
    from huggingface_hub import constants

    return CheckpointError(
        f"the hub at {constants.ENDPOINT} cannot be reached ({why})",
        remedy="name a folder that holds the encoder, or run where the hub can be reached",
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _read(source: str, path: Path) -> Known:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        patch = config.get("patch_size")
        return Known(int(config["hidden_size"]), None if patch is None else int(patch))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{source} is no encoder that can be used: its {_CONFIG} tells no hidden_size ({type(error).__name__})",
            remedy=_REMEDY,
        ) from None
