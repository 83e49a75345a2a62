"""Removes what killed runs have left: temporary folders, half-written corpora, training states."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from infra import layout, scratch
from infra.scratch import Removed
from infra.store import FileStore, Store
from training.leftovers import States, collect_states

UNFINISHED = rf"tmp.*|{scratch.PREFIX}.*"  # folders in which a corpus was being written


class Leftovers(NamedTuple):
    folders: Removed  # on this machine: Ray's sessions, what ranks and tasks fetched, half-written corpora
    states: States  # in the store

    def __str__(self) -> str:
        """Empty if nothing was left."""
        lines = []
        if self.folders.folders:
            lines.append(f"{self.folders} of temporary files")
        if self.states.objects:
            lines.append(f"{self.states.objects:,} objects, {self.states.bytes / 2**20:,.1f} MiB of training states")
        return "; ".join(lines)


def remove(
    store: Store, home: Path | None = None, older_than_hours: float = 24.0, *, dry_run: bool = False
) -> Leftovers:
    """`home` is the workflow's folder on this machine; without it, the store's folder, if it is one."""
    home = home or (store.root if isinstance(store, FileStore) else None)
    folders = scratch.sweep(dry_run=dry_run)
    if home is not None:
        folders += scratch.sweep([home / layout.CORPUS.under()], UNFINISHED, dry_run=dry_run)
    return Leftovers(folders, collect_states(store, older_than_hours, dry_run=dry_run))
