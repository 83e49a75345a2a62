"""What a command works with: the store, a folder of this machine, the Ray cluster and the tracker."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from infra.cluster import ClusterSettings, connect, disconnect
from infra.config import digest
from infra.notices import watched
from infra.store import FileStore, Store, open_store
from infra.tracking import Tracker
from orchestration import leftovers, terminal
from pipelines.recipes import Recipe
from pipelines.stages.base import Context


def store_of(url: str | None, recipe: Recipe) -> Store:
    """The store at `url`; without one, the folder runs/RECIPE."""
    return open_store(url or f"runs/{recipe.name}", recipe.store)


def cluster_of(recipe: Recipe, address: str | None) -> ClusterSettings:
    """The recipe's settings; an address from the command line takes precedence."""
    return recipe.cluster.model_copy(update={"address": address}) if address else recipe.cluster


def home_of(store: Store, name: str) -> Path:
    """The workflow's local folder, for MLflow's database and corpora: the store itself, if that is a folder."""
    home = store.root if isinstance(store, FileStore) else Path("runs") / name
    home.mkdir(parents=True, exist_ok=True)
    return home.absolute()


def tidy(store: Store, home: Path | None = None) -> None:
    """Remove what killed runs have left, and tell the user how much that was."""
    if left := str(leftovers.remove(store, home)):
        print(f"removed what killed runs had left: {left}", file=sys.stderr)


@contextmanager
def joined(screen: terminal.Screen, settings: ClusterSettings) -> Iterator[None]:
    """Connected to the Ray cluster at the address, or to one started on this machine, while the body runs."""
    address = settings.address
    screen.doing(f"joining the Ray cluster at {address}" if address else "starting Ray")
    connect(settings)
    try:
        yield
    finally:
        screen.doing("leaving the Ray cluster" if address else "stopping Ray")
        disconnect()


@contextmanager
def context_of(store: Store, recipe: Recipe, cluster: ClusterSettings, screen: terminal.Screen) -> Iterator[Context]:
    """What the stages of a workflow work with, while the body runs: a cluster, MLflow, progress on the screen."""
    name, home = recipe.name, home_of(store, recipe.name)
    uri = recipe.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home / 'mlflow.db'}"
    with joined(screen, cluster):
        screen.doing("opening MLflow")
        artifacts = None if uri.startswith("http") else home / "mlartifacts"  # a server decides itself
        with closing(Tracker(uri, recipe.tracking.experiment, artifacts)) as tracker:
            parent = tracker.run(name, digest([name, store.url]))
            try:
                with watched():
                    yield Context(store, home, tracker, parent, screen.progress)
            except BaseException:
                parent.end("FAILED")
                raise
            parent.end()
