"""What all checks of a store share: damage is reported and not raised, and a store that fails is not damage."""

from __future__ import annotations

import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pyarrow as pa

from data_prep.prepare.originals import BatchRecord
from infra.errors import DataError, NotFound, PixnerdError, RecordError, StoreError, StoreUnreachable
from infra.files import sha256_of
from infra.records import DataObject, ShardRecord, named_sha256
from infra.store import Store

# What reading a damaged record, index or tar raises. A store that fails raises others: no reason to delete anything.
DAMAGE = (
    *(RecordError, DataError, NotFound, tarfile.TarError, pa.ArrowException),
    *(ValueError, LookupError, TypeError, AttributeError, RecursionError),
)


class Findings(NamedTuple):
    """What is wrong with one thing."""

    damage: list[str]
    failures: list[str]  # of the store itself, such as a bad disk or server; then nothing is known of the thing


def examine(check: Callable[[], Iterable[str]]) -> Findings:
    """Run a check that yields the damage it finds, or raises it."""
    damage: list[str] = []
    try:
        damage.extend(check())
    except StoreUnreachable:
        raise
    except DAMAGE as error:
        damage.append(message(error))
    except StoreError as error:
        return Findings(damage, [str(error)])
    return Findings(damage, [])


def message(error: Exception) -> str:
    return error.message if isinstance(error, PixnerdError) else str(error)


def is_damaged(store: Store, key: str) -> bool:
    """Whether an object exists and its bytes do not have the hash in its name."""
    named = named_sha256(key)
    if named is None or not store.exists(key):
        return False
    with TemporaryDirectory(prefix="pixnerd-verify-") as folder:
        path = Path(folder, "object")
        store.download(key, path)
        return sha256_of(path) != named


def index_and_tar(record: ShardRecord | BatchRecord) -> list[DataObject]:
    return [record.index, *([] if record.tar is None else [record.tar])]


class Report(ABC):
    """What is wrong with the things of one kind in a store, and what to delete so that they can be made again."""

    @abstractmethod
    def read(self) -> None:
        """Check all of them."""

    @abstractmethod
    def objects(self) -> list[str]:
        """The keys of damaged objects of the things that must be made again. Reading these may report more problems."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.problems: list[str] = []
        self.lasting = 0

    def note(self, name: str, findings: Findings) -> bool:
        """Report what is wrong with a thing; returns whether it is damaged."""
        self.problems += [f"{name}: {problem}" for problem in findings.damage]
        for problem in findings.failures:
            self.note_lasting(name, problem)
        return bool(findings.damage)

    def note_lasting(self, name: str, problem: str) -> None:
        """Report a problem that stays whatever is made again."""
        self.problems.append(f"{name}: {problem}")
        self.lasting += 1

    def damaged(self, names: Mapping[str, str]) -> list[str]:
        """Those of these objects that are damaged themselves: key of the object -> name of the thing it belongs to."""

        def check(key: str, name: str) -> bool:
            try:
                return is_damaged(self.store, key)
            except StoreUnreachable:
                raise
            except StoreError as error:
                self.note_lasting(name, str(error))
                return False

        return [key for key, name in names.items() if check(key, name)]
