"""How what lies in a store is looked at: damage is told and not raised, and a store that fails is no damage."""

from __future__ import annotations

import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pyarrow as pa

from infra.errors import DataError, NotFound, PixnerdError, RecordError, StoreError, StoreUnreachable
from infra.files import sha256_of
from infra.records import named_sha256
from infra.store import Store

# What reading a damaged record, index or tar comes to. A store that fails is something else, and no reason to delete.
DAMAGE = (
    *(RecordError, DataError, NotFound, tarfile.TarError, pa.ArrowException),
    *(ValueError, LookupError, TypeError, AttributeError, RecursionError),
)


class Looked(NamedTuple):
    """What is wrong with one thing."""

    problems: list[str]
    lasting: list[str]  # what the store itself says: a bad disk, a failing server; nothing is known of the thing


def looked(problems: Callable[[], Iterable[str]]) -> Looked:
    found: list[str] = []
    try:
        found.extend(problems())
    except StoreUnreachable:
        raise
    except DAMAGE as error:
        found.append(said(error))
    except StoreError as error:
        return Looked(found, [str(error)])
    return Looked(found, [])


def said(error: Exception) -> str:
    return error.message if isinstance(error, PixnerdError) else str(error)


def is_damaged(store: Store, key: str) -> bool:
    """Whether an object is there and does not have the hash in its name."""
    named = named_sha256(key)
    if named is None or not store.exists(key):
        return False
    with TemporaryDirectory(prefix="pixnerd-verify-") as folder:
        path = Path(folder, "object")
        store.download(key, path)
        return sha256_of(path) != named


class Report(ABC):
    """What was wrong with all things of a kind, and what is to go so that they can be made again."""

    @abstractmethod
    def read(self) -> None:
        """Look at all of them."""

    @abstractmethod
    def objects(self) -> list[str]:
        """The damaged ones of the objects of what must be made again. Reading them may tell of more."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.problems: list[str] = []
        self.lasting = 0

    def note(self, what: str, found: Looked) -> bool:
        """Whether it is damaged."""
        self.problems += [f"{what}: {problem}" for problem in found.problems]
        for problem in found.lasting:
            self.lasts(what, problem)
        return bool(found.problems)

    def lasts(self, what: str, problem: str) -> None:
        self.problems.append(f"{what}: {problem}")
        self.lasting += 1

    def damaged(self, keys: Iterable[str], what: Callable[[str], str]) -> list[str]:
        """Those of these objects that are damaged themselves; `what` tells which thing one belongs to."""

        def check(key: str) -> bool:
            try:
                return is_damaged(self.store, key)
            except StoreUnreachable:
                raise
            except StoreError as error:
                self.lasts(what(key), str(error))
                return False

        return [key for key in dict.fromkeys(keys) if check(key)]
