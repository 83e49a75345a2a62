"""An exhausted machine and a lost cluster are recognised under whatever name they come; bugs are not taken for them."""

from __future__ import annotations

import errno
import re
import sqlite3
from pathlib import Path

import pytest
from ray import exceptions

from infra.causes import explained
from infra.errors import ClusterError, DataError


class SafetensorError(Exception):
    """As safetensors raises it."""


class TrainFailed(exceptions.RayError):  # type: ignore[misc]  # Ray is Any to the checker
    """As Ray Train raises it: an error of each rank's."""

    def __init__(self, **failures: Exception) -> None:
        super().__init__("2 workers failed")
        self.worker_failures = failures


def task_error(cause: Exception) -> exceptions.RayTaskError:
    return exceptions.RayTaskError("make", "Traceback", cause)


FULL = OSError(errno.ENOSPC, "No space left on device", "/tmp/x")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (FULL, r"the disk is full \(/tmp/x\).*TMPDIR"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "share of the disk"),
        (OSError(errno.EFBIG, "File too large"), "ulimit -f"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "ulimit -v"),
        (MemoryError(), "ulimit -v"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "ulimit -v"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory"), "ulimit -v"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (sqlite3.OperationalError("database or disk is full"), "the disk is full"),
        (exceptions.OutOfDiskError("x"), "the disk is full"),
        (exceptions.OutOfMemoryError("x"), "too little memory"),
        (task_error(FULL), "the disk is full"),
        (TrainFailed(a=RuntimeError("Connection closed by peer"), b=task_error(FULL)), "the disk is full"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_what_the_machine_has_no_more_of(error: Exception, says: str):
    found = explained(error)
    assert found is not None
    assert found.exit_code == 1
    assert re.search(says, str(found))


def test_our_own_error_is_found_within_others():
    own = DataError("ours", remedy="x")
    wrapped = ValueError("theirs")
    wrapped.__cause__ = own
    assert explained(own) is own
    assert explained(wrapped) is own
    assert explained(task_error(own)) is own
    assert explained(TrainFailed(a=RuntimeError("x"), b=task_error(own))) is own


@pytest.mark.parametrize(
    "error", [exceptions.RaySystemError("the raylet is dead"), exceptions.NodeDiedError("x"), exceptions.RpcError("y")]
)
def test_a_lost_cluster(error: Exception):
    assert isinstance(explained(error), ClusterError)


def test_a_bug_is_a_bug():
    def bug() -> None:
        try:
            raise DataError("handled", remedy="x")
        except DataError:
            raise KeyError("bug") from None

    for error in (KeyError("x"), RuntimeError("x"), OSError(errno.ENOENT, "No such file", str(Path("x")))):
        assert explained(error) is None
    with pytest.raises(KeyError) as caught:
        bug()
    assert explained(caught.value) is None
