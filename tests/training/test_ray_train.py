"""What another attempt is worth, and whose GPUs count."""

from __future__ import annotations

from typing import Any

import pytest

from infra.errors import DataError, PixnerdError, SettingsError, StoreError, TrainingError
from tests.infra.faked_time import FakedTime
from tests.training.small_run import SETTINGS
from training import ray_train
from training.job import Job
from training.settings import TrainSettings


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the next attempts come to: an error, `saved` before an error, or the end."""
    outcomes: list[Any] = []

    def attempt(job: Job, news: Any) -> None:
        for outcome in iter(lambda: outcomes.pop(0), None):
            if not isinstance(outcome, str):
                raise outcome
            news({"event": outcome})

    monkeypatch.setattr(ray_train, "_attempt", attempt)
    monkeypatch.setattr(ray_train, "_PAUSE_SECONDS", 0.0)
    return outcomes


class Back:
    """A store that answers again from some moment on."""

    def __init__(self, clock: FakedTime, at: float = 0.0) -> None:
        self.clock, self.at = clock, at

    def exists(self, key: str) -> bool:
        if self.clock.now < self.at:
            self.clock.now += 75.0  # as long as a call is patient
            raise StoreError("away", remedy="")
        return False


def fit(retries: int, store: Any = None) -> list[str]:
    said: list[str] = []
    settings = TrainSettings(**SETTINGS, retries=retries)
    job: Any = type("Job", (), {"settings": settings, "store": store or Back(FakedTime()), "prefix": "training/x"})
    ray_train._fit(job, lambda message: said.append(message.get("text", "")))
    return [text for text in said if text]


DEATH = ray_train.Interrupted("a rank died", remedy="")


def test_deaths_are_retried_so_often_and_each_state_renews_the_allowance(attempts: list[Any]):
    attempts += [DEATH, DEATH, "saved", DEATH, DEATH, "saved", StoreError("away", remedy=""), None]
    said = fit(retries=2)
    assert [text[-2:-1] for text in said] == ["2", "1", "2", "1", "2"]
    assert "starting again from the last committed state" in said[0]


@pytest.mark.parametrize(("minutes", "attempts_made"), [(1, 2), (5, 2), (9, 2), (45, 3)])
def test_a_store_that_is_away_costs_one_attempt_however_long_it_is(
    minutes: int, attempts_made: int, attempts: list[Any], monkeypatch: pytest.MonkeyPatch
):
    """However long, that is, up to the watchdog's ten minutes; then there is another attempt, which waits as well."""
    clock = FakedTime()
    monkeypatch.setattr(ray_train, "time", clock)
    monkeypatch.setattr(ray_train, "_PAUSE_SECONDS", 5.0)
    store = Back(clock, clock.now + 60 * minutes)
    started: list[float] = []

    def attempt(job: Job, news: Any) -> None:
        started.append(clock.now)
        if clock.now < store.at:
            clock.now += 90.0  # to start, and a call's patience
            raise StoreError("away", remedy="")

    monkeypatch.setattr(ray_train, "_attempt", attempt)
    if minutes < 30:
        assert len(fit(retries=2, store=store)) == 1
    else:
        with pytest.raises(StoreError, match="away"):
            fit(retries=2, store=store)
    assert len(started) == attempts_made


def test_ten_kills_in_one_run_are_survived_where_each_comes_further(attempts: list[Any]):
    attempts += ["saved", DEATH] * 10 + [None]
    assert len(fit(retries=1)) == 10


def test_without_progress_the_last_error_is_raised(attempts: list[Any]):
    attempts += [DEATH, DEATH, None]
    with pytest.raises(ray_train.Interrupted):
        fit(retries=1)


@pytest.mark.parametrize(
    "error", [SettingsError("", remedy=""), DataError("", remedy=""), TrainingError("TypeError", remedy="")]
)
def test_faults_that_repeat_are_not_retried(error: PixnerdError, attempts: list[Any]):
    attempts += [error, None]
    with pytest.raises(type(error)):
        fit(retries=5)
    assert attempts == [None]


class Failed(Exception):
    def __init__(self, **worker_failures: BaseException) -> None:
        super().__init__("a worker failed")
        self.worker_failures = worker_failures


def test_a_rank_that_hears_of_a_death_is_told_from_a_mistake():
    closed = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    assert isinstance(ray_train._cause(Failed(a=closed)), ray_train.Interrupted)
    assert not isinstance(ray_train._cause(Failed(a=closed, b=TypeError("a bug"))), ray_train.Interrupted)
    full = StoreError("the store is full", remedy="make room")
    assert ray_train._cause(Failed(a=closed, b=full)) is full


def test_the_gpus_of_the_cluster_count():
    assert ray_train.wants_gpus("auto", 4, 8.0)
    assert not ray_train.wants_gpus("auto", 4, 0)
    assert not ray_train.wants_gpus("cpu", 4, 8.0)
    with pytest.raises(SettingsError, match="4 workers need as many GPUs, and the cluster has 2"):
        ray_train.wants_gpus("auto", 4, 2.0)
    with pytest.raises(SettingsError, match="the cluster has 0"):
        ray_train.wants_gpus("gpu", 1, 0)


def test_who_hangs_is_named_and_who_says_nothing_too():
    job: Any = type("Job", (), {"settings": TrainSettings(**SETTINGS, workers=2)})
    error = ray_train._stood_still(job, {0: "rank 0 on a has taken no step for 9 s: it is at all_reduce in x.py:1"})
    assert "rank 0 on a has taken no step" in error.message
    assert "nothing was heard of rank 1" in error.message
