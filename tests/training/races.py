"""Two drivers on one training run, killed and delayed at random: python -m tests.training.races --races 200

Each driver starts two ranks of its own over gloo, as Ray Train would, and begins again after a rank died. A race ends
well if whatever was published is the undisturbed run's model, and if that is what every driver got that ended with 0.
One process imports everything and forks the others, so that a race takes about a second of CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from infra.claim import held
from infra.config import canonical_json
from infra.records import CheckpointRecord
from infra.store import Entry, FileStore
from tests.training import small_run
from tests.training.forks import forked, import_all, together
from training import checkpoint
from training.job import Job
from training.loop import train

RANKS = 2
SETTINGS: dict[str, Any] = {"workers": RANKS, "steps": 8, "save_every": 2, "objective": {"repa": 0.0}, "train_text": 0}


class Slow(FileStore):
    """Every call may take a while, so that what two drivers do falls between each other's calls."""

    longest = 0.15

    def _dawdle(self) -> None:
        if random.random() < 0.5:
            time.sleep(random.uniform(0, self.longest))

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        self._dawdle()
        return super().get(key, start, end)

    def create(self, key: str, data: bytes | Path) -> bool:
        self._dawdle()
        return super().create(key, data)

    def delete(self, key: str) -> None:
        self._dawdle()
        super().delete(key)

    def download(self, key: str, path: Path) -> None:
        self._dawdle()
        super().download(key, path)

    def list_unchecked(self, prefix: str = "") -> Iterator[Entry]:
        self._dawdle()
        yield from super().list_unchecked(prefix)


def attempt(job: Job, out: Path) -> bool:
    """One start of all ranks; rank 0 writes the record that it got."""

    def rank(number: int) -> None:
        record = train(job, lambda message: None)
        if number == 0:
            out.write_text(canonical_json(record))

    return not any(together(RANKS, rank))


def driver(job: Job, out: Path, claims: bool) -> int:
    """What `ray_train.fit` does, with processes in place of Ray's workers; 0 if the run was published."""
    os.setpgid(0, 0)

    def done() -> bool:
        return checkpoint.published(job.store, job.prefix) is not None

    with contextlib.ExitStack() as stack:
        if claims:
            job.claim = stack.enter_context(held(job.store, job.prefix, done, lambda host: None, 0.1))
        return 0 if any(attempt(job, out) for _ in range(4)) else 1


@dataclass
class Race:
    """One race's plan, the same for the same seed."""

    claims: bool  # without, both drivers train at once: the states alone must keep them apart
    start: float  # seconds after which the second driver begins
    kills: list[tuple[float, int, bool]]  # when, which driver, and whether its ranks die with it

    @classmethod
    def drawn(cls, seed: int, number: int) -> Race:
        draw = random.Random(f"{seed}/{number}")
        kills = [
            (draw.uniform(0.3, 6), draw.randrange(2), draw.random() < 0.6) for _ in range(draw.choice([0, 1, 1, 2]))
        ]
        return cls(draw.random() < 0.5, draw.choice([0.0, draw.uniform(0, 3)]), sorted(kills))


def run_race(job: Job, race: Race, folder: Path) -> str:
    """What went wrong; empty if nothing did."""
    started: list[int] = []
    try:
        return _run_race(job, race, folder, started)
    finally:
        for pid in started:  # a rank whose driver was killed before it started the other one waits for that for long
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


def _run_race(job: Job, race: Race, folder: Path, started: list[int]) -> str:
    outs = [folder / f"{job.digest}-{n}" for n in range(2)]

    def start(number: int) -> int:
        started.append(forked(lambda: driver(job, outs[number], race.claims)))
        return started[-1]

    events: list[tuple[float, str, int, bool]] = [(0.0, "start", 0, False), (race.start, "start", 1, False)]
    events += [(when, "kill", number, whole) for when, number, whole in race.kills]
    began, pids, codes = time.monotonic(), {}, {}
    for when, what, number, whole in sorted(events):
        time.sleep(max(0.0, began + when - time.monotonic()))
        if what == "start":
            pids[number] = start(number)
        elif number in pids and os.waitpid(pids[number], os.WNOHANG)[0] == 0:
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if whole else os.kill)(pids[number], signal.SIGKILL)
            os.waitpid(pids[number], 0)
            pids[number] = start(number)  # whoever stopped it starts it again
        else:
            pids.pop(number, None)
            codes[number] = 0 if outs[number].exists() else 1
    for number, pid in pids.items():
        codes[number] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    published = checkpoint.published(job.store, job.prefix)
    if published is None:
        return f"nothing was published, exit codes {codes}"
    got = [CheckpointRecord.model_validate_json(out.read_text()) for out in outs if out.exists()]
    if any(record != published for record in got):
        return "a driver got another record than the one that is published"
    return "" if 0 in codes.values() else f"no driver ended with 0: {codes}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--races", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    import_all()
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = FileStore(folder / "store")
        made: dict[str, Any] = {}
        # Data and encoders come from a child: what they start (threads, a pool) is not forked along.
        pid = forked(lambda: _write(folder, store))
        assert os.waitpid(pid, 0)[1] == 0
        made = json.loads((folder / "made.json").read_text())
        bad = races(store, made, folder, arguments.races, arguments.seed)
    print(json.dumps({"races": arguments.races, "bad": bad}))
    sys.exit(bool(bad))


def _write(folder: Path, store: FileStore) -> int:
    snapshot, encoders = small_run.write_data(folder / "corpus", store), small_run.write_encoders(folder / "enc", store)
    plain = {part: {name: data.model_dump() for name, data in files.items()} for part, files in encoders.items()}
    (folder / "made.json").write_text(json.dumps({"snapshot": snapshot.model_dump(mode="json"), "encoders": plain}))
    return 0


def races(store: FileStore, made: dict[str, Any], folder: Path, count: int, seed: int) -> dict[str, str]:
    """Race -> what went wrong in it."""
    from infra.records import DataObject, SnapshotRecord

    snapshot = SnapshotRecord.model_validate(made["snapshot"])
    encoders = {
        part: {name: DataObject.model_validate(data) for name, data in files.items()}
        for part, files in made["encoders"].items()
    }

    def job(name: str, store: FileStore) -> Job:
        return replace(small_run.job_in(store, snapshot, encoders, name, **SETTINGS), scratch=folder)

    alone = job("undisturbed", store)
    assert os.waitpid(forked(lambda: driver(alone, folder / "undisturbed", True)), 0)[1] == 0
    expected = checkpoint.published(store, alone.prefix)
    assert expected is not None
    bad: dict[str, str] = {}
    for number in range(count):
        race = Race.drawn(seed, number)
        slow = job(f"race-{number}", Slow(store.root))
        problem = run_race(slow, race, folder)
        found = checkpoint.published(store, slow.prefix)
        if found and {n: d.sha256 for n, d in found.files.items()} != {n: d.sha256 for n, d in expected.files.items()}:
            problem += " another model than the undisturbed one"
        if problem:
            bad[f"{number} {race}"] = problem
        print(f"race {number}: {problem or 'good'}", file=sys.stderr, flush=True)
    return bad


if __name__ == "__main__":
    main()
