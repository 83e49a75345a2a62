"""One training run, as the driver hands it to every rank."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from infra.claim import Claim
from infra.records import CheckpointRecord, DataObject, SnapshotRecord
from infra.store import Store
from infra.tracking import Run
from training.loader import cache
from training.settings import TrainSettings

Files = dict[str, DataObject]  # by path in the folder that they make up


@dataclass
class Job:
    """One training run: what `train` needs on every rank. It is pickled to the workers."""

    store: Store
    prefix: str  # of the keys of all that it stores
    digest: str  # of the run
    settings: TrainSettings
    snapshot: SnapshotRecord
    text: Files | str  # a text encoder's files in the store, or a published one's name; labels need none
    vision: Files | str | None
    start_from: CheckpointRecord | None
    run: Run
    lpips: str | None = None  # where a folder or a hub has its weights, if a perceptual loss needs it
    claim: Claim | None = None  # the driver's, if several drivers may start this run
    ends_soon: Callable[[], bool] | None = None  # asked on all ranks alike: whether machines will be taken away
    stopped: Callable[[], bool] | None = None  # asked on rank 0: whether somebody has stopped the run
    scratch: Path = field(default_factory=lambda: Path(tempfile.gettempdir()))  # for temporary files
    cache: Path = field(default_factory=cache.default_folder)  # where `reading.cache` names none

    def check_claim(self) -> None:
        if self.claim is not None:
            self.claim.check()
