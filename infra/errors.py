"""Every error that a user can meet, with what to do about it.

    PixnerdError                  exit code 1: the work failed
    ├── SettingsError             exit code 2: a setting, an argument or a recipe is wrong
    ├── StoreError                object storage failed or refused
    │   ├── StoreUnreachable      nobody answers at the store's URL, or the credentials are refused
    │   ├── NotFound              no such object
    │   └── UnsafeStore           the server ignores create-if-absent, so records would not be safe in it
    ├── RecordError               a record is unreadable or from a newer pixnerd
    ├── DataError                 a corpus, shard or snapshot is not what it claims to be
    ├── CheckpointError           a checkpoint is missing, damaged, or of another shape
    ├── TrainingError             training diverged or a worker died for good
    ├── EvaluationError           prompts, images or a judge are not usable
    ├── ClusterError              Ray could not be started, reached, or given what was asked for
    ├── TrackingError             MLflow did not take what the work needs it to take
    ├── TakenOver                 another driver has taken this work over, since this one sent no heartbeat
    ├── StageFailed               a stage of a workflow failed; wraps the cause
    ├── NotPromoted               exit code 3: a gate is closed, so what stands behind it is not done
    ├── NotNow                    exit code 75: another driver has the work, or what it needs is missing
    └── Stopped                   exit code 143: somebody asked for it by SIGTERM

`message` says what happened, `remedy` what to do about it: both are required, since an error without a next step is a
dead end. Programming errors are asserts and ordinary exceptions, never these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class PixnerdError(Exception):
    exit_code = 1

    def __init__(self, message: str, *, remedy: str) -> None:
        super().__init__(message, remedy)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}: {self.remedy}"

    def __reduce__(self) -> tuple[object, ...]:
        # By default the keyword-only remedy would be lost in pickling, on the way from a Ray worker.
        return _rebuild, (type(self), self.message, self.remedy)


def _rebuild(kind: type[PixnerdError], message: str, remedy: str) -> PixnerdError:
    return kind(message, remedy=remedy)


class Fault(NamedTuple):
    """One mistake in settings."""

    path: str  # of the setting: `low.optim.lr`
    message: str
    remedy: str


class SettingsError(PixnerdError):
    """`faults`: the single mistakes, if they are known."""

    exit_code = 2

    def __init__(self, message: str, *, remedy: str, faults: Sequence[Fault] = ()) -> None:
        super().__init__(message, remedy=remedy)
        self.faults = tuple(faults)


class StoreError(PixnerdError): ...


class StoreUnreachable(StoreError): ...


class NotFound(StoreError): ...


class UnsafeStore(StoreError): ...


class RecordError(PixnerdError): ...


class DataError(PixnerdError): ...


class CheckpointError(PixnerdError): ...


class TrainingError(PixnerdError): ...


class EvaluationError(PixnerdError): ...


class ClusterError(PixnerdError): ...


class TrackingError(PixnerdError): ...


class TakenOver(PixnerdError): ...


class StageFailed(PixnerdError): ...


class NotPromoted(PixnerdError):
    exit_code = 3


class NotNow(PixnerdError):
    exit_code = 75  # as sysexits.h has it for what is to be tried again later


class Stopped(PixnerdError):
    exit_code = 143
