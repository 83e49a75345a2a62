"""MLflow, and only here: one parent run a workflow, one nested run a stage.

Tracking observes the work and must never stop it or hold it up. Whatever is logged is handed to a thread, which keeps
the order, waits while MLflow is away and goes on when it is back; what could not be told it is told to the user, once.
The records in the store stay the truth; MLflow shows them. Only the driver logs: what its workers have to say reaches
it as messages, so a database in a file needs to be seen by one machine alone. Nested runs carry the digest of the
stage's work as a tag, so a resumed stage continues the run it began.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import IO, Any, TypeVar

from infra.calls import Calls, NotTaken
from infra.config import Settings, operational
from infra.errors import TrackingError

DIGEST_TAG = "pixnerd.digest"
SOURCE_TAG = "pixnerd.source"
_SQLITE = "sqlite:///"  # and the path
_BATCH = 900  # the server takes at most 1,000 metrics in a call
_LOCK_SECONDS = 60.0  # that others may take to open a database file; who holds it longer is stopped or hangs
_LOCK_EVERY = 0.1
_REGISTER_SECONDS = 90.0  # that may pass until a model is registered
_FLUSH_SECONDS = 1.0
_CLOSE_SECONDS, _CLOSE_AWAY_SECONDS = 12.0, 2.0  # for what waits at the end: with an MLflow that answers, and without

_URI = "MLFLOW_TRACKING_URI"

Call = Callable[[Any, str], object]  # is given MLflow's client and the run's id
T = TypeVar("T")


class TrackingSettings(Settings):
    uri: str | None = operational(
        None, description="MLflow server or database; none: MLFLOW_TRACKING_URI, else SQLite beside the store"
    )
    experiment: str = operational("pixnerd", min_length=1, description="under which MLflow shows the runs")


def _pointed_here(call: Callable[..., T]) -> Callable[..., T]:
    """For what takes no URI. MLflow writes it into the environment, where every later process would find it."""

    @wraps(call)
    def pointed(self: Tracker, *arguments: Any) -> T:
        import mlflow

        before = os.environ.get(_URI)
        mlflow.set_tracking_uri(self.uri)
        try:
            return call(self, *arguments)
        finally:
            mlflow.set_tracking_uri(None)
            if before is not None:
                os.environ[_URI] = before

    return pointed


class Tracker:
    """One experiment on one MLflow server or database, which is opened when it answers."""

    def __init__(self, uri: str, experiment: str, artifacts: Path | None = None) -> None:
        self.uri, self.experiment, self._artifacts = uri, experiment, artifacts
        _prepare(uri)
        self._calls = Calls(f"MLflow at {_masked(uri.removeprefix(_SQLITE))}", _judge)
        self._client: Any = None
        self._experiment_id = ""
        self._refusal: Exception | None = None

    def run(self, name: str, digest: str, parent: Run | None = None, tags: Mapping[str, str] | None = None) -> Run:
        """The run of the work with this digest: the one begun earlier, or a new one."""

        def begin() -> tuple[Any, str]:
            client = self._opened()
            above = parent.begun()[1] if parent is not None else ""
            return client, self._begun(name, digest, above) or self._begin(name, digest, above, tags or {})

        run = Run(self._calls, begin)
        run.call(lambda client, run_id: None)
        return run

    def register(
        self, name: str, alias: str, run: Run, source: str, tags: Mapping[str, str], metrics: Mapping[str, float]
    ) -> str:
        """A version of a registered model that stands for a checkpoint in the store; returns the version."""
        try:
            return self._calls.ask(
                lambda: self._register(name, alias, run.begun()[1], source, tags, metrics), _REGISTER_SECONDS
            )
        except NotTaken as error:
            raise TrackingError(
                f"{self._calls.name} did not take the model ({error})",
                remedy="mend that, or set MLFLOW_TRACKING_URI to another server; then run again: the rest is done",
            ) from None

    def close(self) -> None:
        """The end: what waits has some last seconds, and what is left then is told."""
        self._calls.close(_CLOSE_SECONDS, _CLOSE_AWAY_SECONDS)

    def _opened(self) -> Any:
        if self._refusal is not None:
            raise self._refusal
        if self._client is None:
            try:
                self._client = self._open()
            except Exception as error:
                if _judge(error)[1] == "refuses":
                    self._refusal = error
                raise
        return self._client

    def _open(self) -> Any:
        from mlflow import MlflowClient

        location = self._artifacts.absolute().as_uri() if self._artifacts else None
        with _alone(self.uri):
            _make_tables(self.uri, location)
            client = MlflowClient(self.uri)
            found = client.get_experiment_by_name(self.experiment)
            if found is None:
                self._experiment_id = str(client.create_experiment(self.experiment, artifact_location=location))
            else:
                self._experiment_id = str(found.experiment_id)
        return client

    def _begun(self, name: str, digest: str, parent: str) -> str | None:
        query = f"tags.`{DIGEST_TAG}` = '{digest}'" + (f" and tags.`mlflow.parentRunId` = '{parent}'" if parent else "")
        found = self._client.search_runs([self._experiment_id], query)
        ids = [
            str(one.info.run_id) for one in found if one.info.run_name == name
        ]  # a name may hold what a query may not
        if not ids:
            return None
        self._client.update_run(ids[0], status="RUNNING")
        return ids[0]

    def _begin(self, name: str, digest: str, parent: str, tags: Mapping[str, str]) -> str:
        all_tags = {**tags, DIGEST_TAG: digest}
        if parent:
            all_tags["mlflow.parentRunId"] = parent
        run = self._client.create_run(self._experiment_id, run_name=name, tags=all_tags)
        return str(run.info.run_id)

    @_pointed_here
    def _register(
        self, name: str, alias: str, run_id: str, source: str, tags: Mapping[str, str], metrics: Mapping[str, float]
    ) -> str:
        import mlflow
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        known = self._client.search_model_versions(f"name='{name}' and run_id='{run_id}'")
        if known:  # an earlier attempt of this stage came as far as this
            self._client.set_registered_model_alias(name, alias, known[0].version)
            return str(known[0].version)
        all_tags = {**tags, SOURCE_TAG: source}
        model = mlflow.create_external_model(
            name=name, source_run_id=run_id, tags=all_tags, experiment_id=self._experiment_id
        )
        now = int(time.time() * 1000)
        logged = [Metric(key, value, now, 0, model_id=model.model_id) for key, value in metrics.items()]
        self._client.log_batch(run_id, metrics=logged)
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        # A server takes no path as a version's source that is not below its own artifacts, but it does take a model.
        version = self._client.create_model_version(
            name, f"models:/{model.model_id}", run_id=run_id, tags=all_tags, model_id=model.model_id
        )
        self._client.set_registered_model_alias(name, alias, version.version)
        return str(version.version)


class Run:
    """Where a stage's figures go: nothing here waits for MLflow, or fails. Without a tracker they go nowhere."""

    def __init__(self, calls: Calls | None = None, begin: Callable[[], tuple[Any, str]] | None = None) -> None:
        self._calls, self._begin = calls, begin
        self._known: tuple[Any, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        if self._calls:
            raise TypeError("only the driver logs: a worker's figures reach it as messages")
        return self.__dict__

    @property
    def run_id(self) -> str | None:
        """None as long as MLflow has not told it."""
        return self._known[1] if self._known else None

    def begun(self) -> tuple[Any, str]:
        """MLflow's client and the run's id; for calls that are being made."""
        assert self._begin is not None, "a run without a tracker is not begun"
        if self._known is None:
            self._known = self._begin()
        return self._known

    def call(self, work: Call) -> None:
        if self._calls:
            self._calls.add(lambda: work(*self.begun()))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        if self._calls:
            self._calls.add_row(self._log_rows, (int(time.time() * 1000), step, values))

    def _log_rows(self, rows: list[tuple[int, int, Mapping[str, float]]]) -> None:
        """Values with the time when they were so, not when MLflow heard of them: logged again they are the same."""
        from mlflow.entities import Metric

        client, run_id = self.begun()
        metrics = [Metric(key, float(value), now, step) for now, step, row in rows for key, value in row.items()]
        for start in range(0, len(metrics), _BATCH):
            client.log_batch(run_id, metrics=metrics[start : start + _BATCH])

    def params(self, values: Mapping[str, Any]) -> None:
        def log(client: Any, run_id: str) -> None:
            from mlflow.entities import Param

            client.log_batch(run_id, params=[Param(key, str(value)[:500]) for key, value in values.items()])

        self.call(log)

    def tags(self, values: Mapping[str, str]) -> None:
        def log(client: Any, run_id: str) -> None:
            from mlflow.entities import RunTag

            client.log_batch(run_id, tags=[RunTag(key, value) for key, value in values.items()])

        self.call(log)

    def artifact(self, path: Path, folder: str = "") -> None:
        self.call(lambda client, run_id: client.log_artifact(run_id, str(path), folder or None))

    def dataset(self, name: str, digest: str, source: str, profile: Mapping[str, Any], context: str) -> None:
        """What the run read, as MLflow's dataset lineage."""

        def log(client: Any, run_id: str) -> None:
            from mlflow.entities import Dataset, DatasetInput, InputTag

            entity = Dataset(
                name=name,
                digest=digest,
                source_type="pixnerd",
                source=json.dumps({"uri": source}),
                profile=json.dumps(dict(profile)),
            )
            tagged = DatasetInput(entity, [InputTag("mlflow.data.context", context)])
            client.log_inputs(run_id, datasets=[tagged])

        self.call(log)

    def flush(self, seconds: float = _FLUSH_SECONDS) -> bool:
        """Whether all that was logged so far has reached MLflow, at the latest after so many seconds."""
        return self._calls.wait(seconds) if self._calls else True

    def end(self, status: str = "FINISHED") -> None:
        self.call(lambda client, run_id: client.set_terminated(run_id, status))


NOWHERE = Run()


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """Whoever opens a new SQLite file makes its tables, and two that do so at once trip over each other's.

    The lock is the kernel's: it ends with its holder, however that ends. The file that it is on stays.
    """
    path = _file_of(uri)
    if path is None:
        yield
        return
    with open(f"{path}.lock", "ab") as file:
        _lock(file)
        yield


def _make_tables(uri: str, artifacts: str | None) -> None:
    """A new SQLite file gets its name once it has all its tables; for the one process that holds the lock.

    MLflow makes them in some fifty steps, and a file that was left between two of them it can neither use nor mend.
    """
    path = _file_of(uri)
    if path is None or (path.exists() and path.stat().st_size):
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    unfinished = path.with_name(f"{path.name}.new")
    for left in (unfinished, Path(f"{unfinished}-journal")):
        left.unlink(missing_ok=True)
    SqlAlchemyStore(f"{_SQLITE}{unfinished}", artifacts or "mlruns").engine.dispose()
    unfinished.replace(path)


def _file_of(uri: str) -> Path | None:
    """The file of a SQLite database, if it is one and in a file."""
    path = uri.removeprefix(_SQLITE).partition("?")[0]
    return None if not uri.startswith(_SQLITE) or path in ("", ":memory:") else Path(path)


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


# What MLflow answers, or its client, while it cannot do what it would do otherwise.
_AWAY = {"TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED"}


def _judge(error: Exception) -> tuple[str, str]:
    """What went wrong, in a line, and whether MLflow is away, faulty, or refuses the call."""
    from mlflow.exceptions import MlflowException, RestException
    from requests.exceptions import RequestException
    from sqlalchemy.exc import OperationalError

    if isinstance(error, MlflowException):
        away = error.error_code in _AWAY or (
            error.error_code == "INTERNAL_ERROR" and not isinstance(error, RestException)
        )
        faulty = error.error_code == "INTERNAL_ERROR"
    else:
        away = isinstance(error, RequestException | OperationalError | ConnectionError | TimeoutError)
        faulty = False
    return _said(error), "away" if away else "faulty" if faulty else "refuses"


def _said(error: BaseException) -> str:
    """The first cause's words: what is wrapped around them is long, and tells of MLflow's ways only."""
    while (before := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = before
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return _masked(lines[0])[:300]


def _masked(text: str) -> str:
    """Without the user and password that an address may hold."""
    return re.sub(r"//[^/@\s]+@", "//", text)


def _prepare(uri: str) -> None:
    """What MLflow reads at import: no calls home, no talk on the terminal, and no retries, which are ours.

    It is imported here, not by the thread: two threads that import the same packages may trip over each other's.
    """
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # a database that is locked is told with its whole traceback otherwise
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
        "GIT_PYTHON_REFRESH": "quiet",
    }.items():
        os.environ.setdefault(name, value)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    import mlflow

    if not uri.startswith("http"):
        import mlflow.store.model_registry.sqlalchemy_store
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
