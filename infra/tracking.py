"""MLflow, and only here: one parent run a workflow, one nested run a stage, metrics in asynchronous batches.

Tracking observes the work and must never stop it: when a call fails, the failure is reported once and the run goes on.
The records in the store stay the truth; MLflow shows them. Nested runs carry the digest of the stage's work as a tag,
so a resumed stage continues the run it began.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from infra.config import Settings, operational

log = logging.getLogger(__name__)

DIGEST_TAG = "pixnerd.digest"
_SQLITE = "sqlite:///"  # and the path
_BATCH = 900  # the server takes at most 1,000 metrics in a call
_LOCK_SECONDS = 60.0  # that others may take to open a database file; who holds it longer is stopped or hangs
_LOCK_EVERY = 0.1

T = TypeVar("T")


class TrackingSettings(Settings):
    uri: str | None = operational(None, description="MLflow server or database; none: SQLite beside the store")
    experiment: str = operational("pixnerd")


class Tracker:
    """One experiment on one MLflow server or database."""

    def __init__(self, uri: str, experiment: str, artifacts: Path | None = None) -> None:
        self.uri, self.experiment = uri, experiment
        _prepare()
        self._experiment_id = _observed(lambda: self._open(artifacts))

    def _open(self, artifacts: Path | None) -> str:
        from mlflow import MlflowClient

        with _alone(self.uri):
            self._client = MlflowClient(self.uri)
            return self._find_or_create(artifacts)

    def _find_or_create(self, artifacts: Path | None) -> str:
        found = self._client.get_experiment_by_name(self.experiment)
        if found is not None:
            return str(found.experiment_id)
        location = artifacts.absolute().as_uri() if artifacts else None
        return str(self._client.create_experiment(self.experiment, artifact_location=location))

    def run(self, name: str, digest: str, parent: Run | None = None, tags: Mapping[str, str] | None = None) -> Run:
        """The run of the work with this digest: the one begun earlier, or a new one."""
        if self._experiment_id is None:
            return Run(self.uri, None)
        run_id = _observed(lambda: self._begun(name, digest, parent) or self._begin(name, digest, parent, tags or {}))
        return Run(self.uri, run_id)

    def _begun(self, name: str, digest: str, parent: Run | None) -> str | None:
        query = f"tags.`{DIGEST_TAG}` = '{digest}' and tags.`mlflow.runName` = '{name}'"
        if parent is not None and parent.run_id:
            query += f" and tags.`mlflow.parentRunId` = '{parent.run_id}'"
        found = self._client.search_runs([self._experiment_id], query, max_results=1)
        if not found:
            return None
        self._client.update_run(found[0].info.run_id, status="RUNNING")
        return str(found[0].info.run_id)

    def _begin(self, name: str, digest: str, parent: Run | None, tags: Mapping[str, str]) -> str:
        all_tags = {**tags, DIGEST_TAG: digest}
        if parent is not None and parent.run_id:
            all_tags["mlflow.parentRunId"] = parent.run_id
        run = self._client.create_run(self._experiment_id, run_name=name, tags=all_tags)
        return str(run.info.run_id)

    def register(
        self, name: str, alias: str, run: Run, source: str, tags: Mapping[str, str], metrics: Mapping[str, float]
    ) -> str | None:
        """A version of a registered model that points at a checkpoint in the store; returns the version."""
        if run.run_id is None:
            return None
        return _observed(lambda: self._register(name, alias, run, source, tags, metrics))

    def _register(
        self, name: str, alias: str, run: Run, source: str, tags: Mapping[str, str], metrics: Mapping[str, float]
    ) -> str:
        import mlflow
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        known = self._client.search_model_versions(f"name='{name}' and run_id='{run.run_id}'")
        if known:  # an earlier attempt of this stage came as far as this
            self._client.set_registered_model_alias(name, alias, known[0].version)
            return str(known[0].version)
        mlflow.set_tracking_uri(self.uri)
        model = mlflow.create_external_model(
            name=name, source_run_id=run.run_id, tags=dict(tags), experiment_id=self._experiment_id
        )
        now = int(time.time() * 1000)
        logged = [Metric(key, value, now, 0, model_id=model.model_id) for key, value in metrics.items()]
        self._client.log_batch(run.run_id, metrics=logged)
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        version = self._client.create_model_version(
            name, source, run_id=run.run_id, tags=dict(tags), model_id=model.model_id
        )
        self._client.set_registered_model_alias(name, alias, version.version)
        return str(version.version)


class Run:
    """A handle that travels to workers: where to log, and under which run. Without a run it logs nowhere."""

    def __init__(self, uri: str, run_id: str | None) -> None:
        self.uri, self.run_id = uri, run_id
        self._client: Any = None
        self._pending: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "run_id": self.run_id, "_client": None, "_pending": []}

    def _call(self, work: Callable[[Any], T]) -> T | None:
        if self.run_id is None:
            return None
        if self._client is None:
            _prepare()
            from mlflow import MlflowClient

            self._client = _observed(lambda: MlflowClient(self.uri))
        if self._client is None:
            self.run_id = None  # told once; from here on nothing is logged
            return None
        return _observed(lambda: work(self._client))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Asynchronous: returns at once; `flush` waits."""
        self.metric_rows([(step, values)])

    def metric_rows(self, rows: list[tuple[int, Mapping[str, float]]]) -> None:
        if self.run_id is None:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(key, float(value), now, step) for step, values in rows for key, value in values.items()]
        for start in range(0, len(metrics), _BATCH):
            batch = metrics[start : start + _BATCH]
            pending = self._call(lambda c, b=batch: c.log_batch(self.run_id, metrics=b, synchronous=False))  # type: ignore[misc]
            if pending is not None:
                self._pending.append(pending)

    def params(self, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(key, str(value)[:500]) for key, value in values.items()]
        self._call(lambda c: c.log_batch(self.run_id, params=params))

    def tags(self, values: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self._call(lambda c: c.log_batch(self.run_id, tags=[RunTag(k, v) for k, v in values.items()]))

    def artifact(self, path: Path, folder: str = "") -> None:
        self._call(lambda c: c.log_artifact(self.run_id, str(path), folder or None))

    def dataset(self, name: str, digest: str, source: str, profile: Mapping[str, Any], context: str) -> None:
        """What the run read, as MLflow's dataset lineage."""
        import json

        from mlflow.entities import Dataset, DatasetInput, InputTag

        entity = Dataset(
            name=name,
            digest=digest,
            source_type="pixnerd",
            source=json.dumps({"uri": source}),
            profile=json.dumps(dict(profile)),
        )
        tagged = DatasetInput(entity, [InputTag("mlflow.data.context", context)])
        self._call(lambda c: c.log_inputs(self.run_id, datasets=[tagged]))

    def flush(self) -> None:
        for pending in self._pending:
            _observed(pending.wait)
        self._pending = []

    def end(self, status: str = "FINISHED") -> None:
        self.flush()
        self._call(lambda c: c.set_terminated(self.run_id, status))


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """Whoever opens a new SQLite file makes its tables, and two that do so at once trip over each other's.

    The lock is the kernel's: it ends with its holder, however that ends. The file that it is on stays.
    """
    path = uri.removeprefix(_SQLITE).partition("?")[0]
    if not uri.startswith(_SQLITE) or path in ("", ":memory:"):
        yield
        return
    with open(f"{path}.lock", "ab") as file:
        _lock(file)
        yield


def _lock(file: IO[bytes]) -> None:
    """The kernel by itself would wait without end."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise TimeoutError(f"another process still holds {file.name} after {_LOCK_SECONDS:g} s") from None
        time.sleep(_LOCK_EVERY)


def _observed(work: Callable[[], T]) -> T | None:
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return work()
    except (MlflowException, SQLAlchemyError, OSError) as error:
        log.warning(
            "MLflow did not take a call and the work goes on without it (%s)",
            (str(error) or type(error).__name__).splitlines()[0],
        )
        return None


def _prepare() -> None:
    """What MLflow reads at import: no calls home, no talk on the terminal, no minutes of retries for a server that is
    down while the work could go on without it."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "ERROR",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
        "GIT_PYTHON_REFRESH": "quiet",
    }.items():
        os.environ.setdefault(name, value)
    logging.getLogger("alembic").setLevel(logging.ERROR)
