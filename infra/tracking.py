"""The only file that uses MLflow: one parent run for a workflow, one nested run for each stage.

Tracking must never stop or delay the work. Everything logged goes to a thread (infra/calls.py), which keeps the order,
waits while MLflow is away and goes on when it is back. The user is told once how much could not be logged. The results
are the records in the store; MLflow only shows them. Only the driver logs: its workers send it messages, so a database
file needs to be reachable by one machine only. Nested runs have the digest of the stage's work as a tag, so that a
resumed stage continues its run.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from infra.calls import Calls, NotTaken
from infra.config import Settings, operational
from infra.errors import TrackingError
from infra.files import locked
from infra.text import masked

DIGEST_TAG = "pixnerd.digest"
CHECKPOINT_TAG = "pixnerd.checkpoint"
_SQLITE = "sqlite:///"  # followed by the path
_BATCH = 900  # metrics in a call; the server takes at most 1,000
_LOCK_SECONDS = 60.0  # to wait for others that open a database file; one that takes longer hangs
_REGISTER_SECONDS = 90.0  # to wait until a model is registered
_FLUSH_SECONDS = 1.0
_CLOSE_SECONDS, _CLOSE_AWAY_SECONDS = 12.0, 2.0  # to send the rest at the end: if MLflow answers, and if it is away

_URI = "MLFLOW_TRACKING_URI"

Answer = TypeVar("Answer")
Call = Callable[[Any, str], object]  # takes MLflow's client and the run's id


class Model(NamedTuple):
    """A checkpoint, as one of MLflow's logged models: whatever measures it logs to the same one."""

    name: str
    checkpoint: str  # the digest of its record
    source: str  # the URL of the record; the weights stay in the store
    snapshot: str  # the digest of the data that it was trained on, if known


class Version(NamedTuple):
    """A version of a registered model."""

    version: str
    checkpoint: str  # the digest of its checkpoint's record


class Measured(NamedTuple):
    """What a checkpoint was measured on."""

    name: str
    digest: str


class TrackingSettings(Settings):
    uri: str | None = operational(
        None, description="MLflow server or database; none: MLFLOW_TRACKING_URI, else SQLite beside the store"
    )
    experiment: str = operational("pixnerd", min_length=1, description="under which MLflow shows the runs")


@contextmanager
def _default_uri(uri: str) -> Iterator[None]:
    """For functions of MLflow that take no URI. Setting it changes the environment, which later processes inherit."""
    import mlflow

    before = os.environ.get(_URI)
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)
        if before is not None:
            os.environ[_URI] = before


class Tracker:
    """An experiment on an MLflow server or database, to which the first call connects."""

    def __init__(self, uri: str, experiment: str, artifacts: Path | None = None) -> None:
        self.uri, self.experiment, self._artifacts = uri, experiment, artifacts
        _prepare(uri)
        self._calls = Calls(f"MLflow at {masked(uri.removeprefix(_SQLITE))}", _judge)
        self._client: Any = None
        self._experiment_id = ""
        self._refusal: Exception | None = None

    def run(self, name: str, digest: str, parent: Run | None = None, tags: Mapping[str, str] | None = None) -> Run:
        """The run of the work with this digest: an earlier one that is continued, or a new one."""

        def begin() -> tuple[Any, str]:
            client = self._opened()
            parent_id = parent.begun()[1] if parent is not None else ""
            return client, self._resume(name, digest, parent_id) or self._begin(name, digest, parent_id, tags or {})

        def model_id(model: Model, run_id: str) -> str:
            with _default_uri(self.uri):
                return self._model_id(model, run_id)

        run = Run(self._calls, begin, model_id)
        run.call(lambda client, run_id: None)
        return run

    def version_of(self, name: str, alias: str) -> Version | None:
        """The version of a registered model that has the alias, if there is one."""

        def look_up() -> Version | None:
            from mlflow.exceptions import MlflowException

            client = self._opened()
            try:
                version = client.get_model_version_by_alias(name, alias)
            except MlflowException as error:
                if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    return None
                raise
            return Version(str(version.version), version.tags.get(CHECKPOINT_TAG, ""))

        return self._asked(look_up, "did not tell the model's version")

    def register(self, name: str, alias: str, run: Run, model: Model, about: str) -> str:
        """Register a checkpoint as a version of a model, with all scores that it has; returns the version."""

        def register() -> str:
            run_id = run.begun()[1]
            with _default_uri(self.uri):  # also for what MLflow's client looks up by itself
                return self._register(name, alias, run_id, model, about)

        return self._asked(register, "did not take the model")

    def _asked(self, work: Callable[[], Answer], failure: str) -> Answer:
        """What a call gives, which is waited for."""
        try:
            return self._calls.ask(work, _REGISTER_SECONDS)
        except NotTaken as error:
            raise TrackingError(
                f"{self._calls.name} {failure} ({error})",
                remedy="mend that, or set MLFLOW_TRACKING_URI to another server; then run again: the rest is done",
            ) from None

    def close(self) -> None:
        """Send the rest within some seconds; the user is told how much could not be sent."""
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
        with _locked(self.uri):
            _make_tables(self.uri, location)
            client = MlflowClient(self.uri)
            known = client.get_experiment_by_name(self.experiment)
            if known is None:
                self._experiment_id = str(client.create_experiment(self.experiment, artifact_location=location))
            else:
                self._experiment_id = str(known.experiment_id)
        return client

    def _resume(self, name: str, digest: str, parent: str) -> str | None:
        """The id of an earlier run of this work, which is set to running again."""
        query = f"tags.`{DIGEST_TAG}` = '{digest}'" + (f" and tags.`mlflow.parentRunId` = '{parent}'" if parent else "")
        runs = self._client.search_runs([self._experiment_id], query)
        # Not in the query: a name may contain characters that a query may not.
        ids = [str(run.info.run_id) for run in runs if run.info.run_name == name]
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

    def _register(self, name: str, alias: str, run_id: str, model: Model, about: str) -> str:
        from mlflow.exceptions import MlflowException

        known = self._client.search_model_versions(f"name='{name}' and run_id='{run_id}'")
        if known:  # an earlier attempt of this stage has registered it
            self._client.set_registered_model_alias(name, alias, known[0].version)
            return str(known[0].version)
        model_id = self._model_id(model, run_id)
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        # As a version's source a server refuses paths outside of its own artifacts, but takes a model.
        version = self._client.create_model_version(
            name, f"models:/{model_id}", run_id, _tags(model), description=about, model_id=model_id
        )
        self._client.set_registered_model_alias(name, alias, version.version)
        return str(version.version)

    def _model_id(self, model: Model, run_id: str) -> str:
        """The logged model that stands for a checkpoint; the first that asks for it makes it."""
        import mlflow

        self._opened()
        query = f"tags.`{CHECKPOINT_TAG}` = '{model.checkpoint}'"
        known = self._client.search_logged_models([self._experiment_id], query, max_results=1)
        if known:
            return str(known[0].model_id)
        # Names of MLflow's models have none of these characters.
        name = re.sub(r"[/:.%\"']", "-", model.name)
        made = mlflow.create_external_model(name, run_id, _tags(model), experiment_id=self._experiment_id)
        return str(made.model_id)


def _tags(model: Model) -> dict[str, str]:
    return {CHECKPOINT_TAG: model.checkpoint, "pixnerd.source": model.source, "pixnerd.snapshot": model.snapshot}


class Run:
    """A run that a stage logs to. No method waits for MLflow, or fails. Without a tracker nothing is logged."""

    def __init__(
        self,
        calls: Calls | None = None,
        begin: Callable[[], tuple[Any, str]] | None = None,
        model_id: Callable[[Model, str], str] | None = None,
    ) -> None:
        self._calls, self._begin, self._model_id = calls, begin, model_id
        self._known: tuple[Any, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        if self._calls:
            raise TypeError("only the driver logs: a worker's figures reach it as messages")
        return self.__dict__

    @property
    def run_id(self) -> str | None:
        """None until MLflow has answered."""
        return self._known[1] if self._known else None

    def begun(self) -> tuple[Any, str]:
        """MLflow's client and the run's id; only for use in the thread that makes the calls."""
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

    def scores(self, model: Model, on: Measured, values: Mapping[str, float], step: int) -> None:
        """Log a checkpoint's scores to this run, which measured it, and to the checkpoint's model."""
        now = int(time.time() * 1000)

        def log(client: Any, run_id: str) -> None:
            assert self._model_id is not None
            model_id, metric = self._model_id(model, run_id), _entities().Metric
            client.log_inputs(run_id, models=[_entities().LoggedModelInput(model_id)])
            metrics = [
                metric(key, value, now, step, model_id, on.name, on.digest, run_id) for key, value in values.items()
            ]
            client.log_batch(run_id, metrics=metrics)

        self.dataset(on.name, on.digest, on.name, {}, "evaluation")
        self.call(log)

    def _log_rows(self, rows: list[tuple[int, int, Mapping[str, float]]]) -> None:
        """Metrics have the time of `metrics()`, not of this call: if it is repeated, they are the same ones."""
        client, run_id = self.begun()
        metric = _entities().Metric
        metrics = [metric(key, float(value), now, step) for now, step, row in rows for key, value in row.items()]
        for start in range(0, len(metrics), _BATCH):
            client.log_batch(run_id, metrics=metrics[start : start + _BATCH])

    def params(self, values: Mapping[str, Any]) -> None:
        self._log("params", lambda: [_entities().Param(key, str(value)[:500]) for key, value in values.items()])

    def tags(self, values: Mapping[str, str]) -> None:
        self._log("tags", lambda: [_entities().RunTag(key, value) for key, value in values.items()])

    def _log(self, what: str, entities: Callable[[], list[Any]]) -> None:
        self.call(lambda client, run_id: client.log_batch(run_id, **{what: entities()}))

    def artifact(self, path: Path) -> None:
        self.call(lambda client, run_id: client.log_artifact(run_id, str(path)))

    def table(self, file: str, columns: Mapping[str, Sequence[Any]]) -> None:
        """Log a table, which MLflow shows by itself; bytes in it are pictures."""

        def log(client: Any, run_id: str) -> None:
            client.log_table(run_id, {name: [_shown(cell) for cell in cells] for name, cells in columns.items()}, file)

        self.call(log)

    def dataset(self, name: str, digest: str, source: str, profile: Mapping[str, Any], context: str) -> None:
        """Log a dataset that the run reads, for MLflow's lineage."""

        def log(client: Any, run_id: str) -> None:
            from mlflow.entities import Dataset, DatasetInput, InputTag

            entity = Dataset(
                name=name,
                digest=digest,
                source_type="pixnerd",
                source=json.dumps({"uri": source}),
                profile=json.dumps(dict(profile)),
            )
            dataset = DatasetInput(entity, [InputTag("mlflow.data.context", context)])
            client.log_inputs(run_id, datasets=[dataset])

        self.call(log)

    def flush(self, seconds: float = _FLUSH_SECONDS) -> bool:
        """Wait until MLflow has everything that was logged so far, at most so many seconds; whether it has."""
        return self._calls.wait(seconds) if self._calls else True

    def end(self, status: str = "FINISHED") -> None:
        self.call(lambda client, run_id: client.set_terminated(run_id, status))


NOWHERE = Run()


def _locked(uri: str) -> AbstractContextManager[None]:
    """Lock a SQLite file: the first to open it makes its tables, and two that do so at once make each other fail."""
    path = _file_of(uri)
    return nullcontext() if path is None else locked(Path(f"{path}.lock"), _LOCK_SECONDS)


def _make_tables(uri: str, artifacts: str | None) -> None:
    """Make a new SQLite file with all its tables, and only then give it its name. The caller holds the lock.

    MLflow makes the tables in some fifty steps, and can neither use nor repair a file that has only some of them.
    """
    path = _file_of(uri)
    if path is None or (path.exists() and path.stat().st_size):
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    unfinished = path.with_name(f"{path.name}.new")
    for leftover in (unfinished, Path(f"{unfinished}-journal")):
        leftover.unlink(missing_ok=True)
    SqlAlchemyStore(f"{_SQLITE}{unfinished}", artifacts or "mlruns").engine.dispose()
    unfinished.replace(path)


def _file_of(uri: str) -> Path | None:
    """The path in a URI of a SQLite database; None for other URIs and for databases in memory."""
    path = uri.removeprefix(_SQLITE).partition("?")[0]
    return None if not uri.startswith(_SQLITE) or path in ("", ":memory:") else Path(path)


# Error codes of MLflow and its client that pass by themselves.
_AWAY = {"TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED"}


def _judge(error: Exception) -> tuple[str, str]:
    """The error in one line, and whether MLflow is "away", "faulty", or "refuses" the call (see `Calls`)."""
    from mlflow.exceptions import MlflowException, RestException
    from requests.exceptions import RequestException
    from sqlalchemy.exc import OperationalError

    if isinstance(error, MlflowException):
        faulty = error.error_code == "INTERNAL_ERROR"
        away = error.error_code in _AWAY or (faulty and not isinstance(error, RestException))
    else:
        away = isinstance(error, RequestException | OperationalError | ConnectionError | TimeoutError)
        faulty = False
    return _first_cause(error), "away" if away else "faulty" if faulty else "refuses"


def _first_cause(error: BaseException) -> str:
    """The text of the first error in the chain: those around it are long, and only tell MLflow's internals."""
    while (before := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = before
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return masked(lines[0])[:300]


def _entities() -> Any:
    from mlflow import entities

    return entities


def _shown(cell: Any) -> Any:
    if not isinstance(cell, bytes):
        return cell
    from mlflow import Image
    from PIL import Image as Pillow

    with Pillow.open(io.BytesIO(cell)) as picture:
        return Image(picture.convert("RGB"))


def _prepare(uri: str) -> None:
    """Configure MLflow by environment variables: no telemetry, no output on the terminal, no retries of its own.

    Then import it here, since imports of the same packages in two threads can interfere.
    """
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # otherwise a locked database prints a traceback
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
