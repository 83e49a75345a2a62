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
from infra.store import Store, open_store
from infra.tracking import Tracker
from orchestration import leftovers, terminal
from pipelines.recipes import Recipe
from pipelines.stages.base import Context


def store_of(url: str | None, recipe: Recipe) -> Store:
    """The one that was named, or the folder of the recipe."""
    return open_store(url or f"runs/{recipe.name}", recipe.store)


def cluster_of(recipe: Recipe, address: str | None) -> ClusterSettings:
    """As the recipe has it, but for an address that was given on the line."""
    return recipe.cluster.model_copy(update={"address": address}) if address else recipe.cluster


def home_of(store: Store, name: str) -> Path:
    """A folder of this machine for what is no record: the store's own if it is a folder, else one beside the work."""
    local = store.url.removeprefix("file://")
    home = Path(local) if store.url.startswith("file://") else Path("runs") / name
    home.mkdir(parents=True, exist_ok=True)
    return home.absolute()


def tidy(store: Store, home: Path | None = None) -> None:
    if left := str(leftovers.remove(store, home)):
        print(f"removed what killed runs had left: {left}", file=sys.stderr)


@contextmanager
def joined(screen: terminal.Screen, settings: ClusterSettings) -> Iterator[None]:
    """The Ray cluster at an address, or one of this machine's own, while the body runs."""
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
    """All that the stages of a workflow may use, while the body runs."""
    name, home = recipe.name, home_of(store, recipe.name)
    uri = recipe.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home / 'mlflow.db'}"
    with joined(screen, cluster):
        screen.doing("opening MLflow")
        artifacts = None if uri.startswith("http") else home / "mlartifacts"  # a server has a place of its own
        with closing(Tracker(uri, recipe.tracking.experiment, artifacts)) as tracker:
            parent = tracker.run(name, digest([name, store.url]))
            try:
                with watched():
                    yield Context(store, home, tracker, parent, screen.progress)
            except BaseException:
                parent.end("FAILED")
                raise
            parent.end()
