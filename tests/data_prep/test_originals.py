"""Lists of URLs, from a real server to shards: downloads are kept, and those that failed can be tried again."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.prepare import originals
from data_prep.prepare.job import Progress, prepare
from data_prep.prepare.plan import PrepareSettings, read_plan
from data_prep.rejections import Cause
from data_prep.upkeep.verify import verify
from infra import layout
from infra.config import parse
from infra.records import PrepareSummary
from infra.shards import list_shards, read_index, shard_key, shard_prefix
from infra.store import Store, open_store
from tests.data_prep import zoo
from tests.data_prep.corpora import contents, retry_failed, shaded
from tests.data_prep.web import Web

pytestmark = pytest.mark.usefixtures("ray_cluster")

COUNT = 40
# By place in every ten rows: what the server does.
FATES = {2: Cause.SERVER_ERROR, 4: Cause.GONE, 5: Cause.OPTED_OUT, 7: Cause.RATE_LIMITED, 8: Cause.BAD_URL}
NO_CAPTION = {1, 7}  # the last one's download fails as well


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def web() -> Iterator[Web]:
    with Web() as web:
        for number in range(COUNT):
            web.pages[f"/{number}"] = page(number)
        yield web


def page(number: int) -> Any:
    photo = zoo.saved(shaded(number, 40), "PNG")
    match FATES.get(number % 10):
        case Cause.SERVER_ERROR:
            return lambda _, stream: stream.answer(status=503)
        case Cause.RATE_LIMITED:
            return lambda _, stream: stream.answer(status=429)
        case Cause.GONE:
            return lambda _, stream: stream.answer(status=404)
        case Cause.OPTED_OUT:
            return lambda _, stream: stream.answer(photo, X_Robots_Tag="noai")
    return photo


def heal(web: Web) -> None:
    for number in range(COUNT):
        web.pages[f"/{number}"] = zoo.saved(shaded(number, 40), "PNG")


def write_list(folder: Path, web: Web) -> None:
    folder.mkdir()
    rows = [
        {
            "url": "file:///etc/passwd" if FATES.get(number % 10) is Cause.BAD_URL else web.url(f"/{number}"),
            "caption": None if number % 10 in NO_CAPTION else f"picture {number}",
            "score": number / COUNT,
        }
        for number in range(COUNT)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "list.parquet", row_group_size=13)


def settings_for(folder: Path, **changes: Any) -> PrepareSettings:
    source = {"kind": "url_list", "name": "web", "url": str(folder), "tables": ["*.parquet"], "keep": ["score"]}
    fetch = {"allow_private": True, "retries": 0, "at_once": 4}
    given = {"sources": [source], "sizes": [32, 16], "rows_per_shard": 16, "fetch": fetch}
    return parse(PrepareSettings, given | changes)


def rows_of(store: Store, summary: PrepareSummary, size: str = "16") -> list[dict[str, Any]]:
    shards = list_shards(store, shard_prefix(summary.plan, size))
    return [row for shard in shards for row in read_index(store, shard).to_pylist()]


def without_originals(store: Store) -> dict[str, bytes]:
    return {key: data for key, data in contents(store).items() if "originals/" not in key and "downloads/" not in key}


@pytest.fixture(autouse=True)
def several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches that do not end where the plan's shards do."""
    monkeypatch.setattr(originals, "ROWS", 7)


def test_every_url_ends_as_a_sample_or_with_a_cause(web: Web, store: Store, tmp_path: Path) -> None:
    write_list(tmp_path / "lists", web)
    settings = settings_for(tmp_path / "lists")
    summary = prepare(store, settings)
    expected = {cause.value: 4 for cause in FATES.values()} | {Cause.NO_CAPTION.value: 4}
    for size in summary.sizes.values():
        assert size.rejected == dict(sorted(expected.items()))
        assert size.accepted == COUNT - sum(expected.values())
    rows = rows_of(store, summary)
    assert [row["row"] for row in rows] == list(range(COUNT))
    for row in rows:
        number = row["row"]
        fate = FATES.get(number % 10) or (Cause.NO_CAPTION if number % 10 in NO_CAPTION else None)
        assert row["cause"] == fate
        assert row["score"] == number / COUNT
        if fate is None:
            assert row["origin"] == web.url(f"/{number}")
            assert row["captions"] == [{"kind": "caption", "text": f"picture {number}"}]
    assert verify(store, summary.plan, summary.edition).problems == []
    asked = len(web.requests)
    assert prepare(store, settings) == summary
    assert len(web.requests) == asked


def test_another_size_needs_no_second_download(web: Web, store: Store, tmp_path: Path) -> None:
    write_list(tmp_path / "lists", web)
    first = prepare(store, settings_for(tmp_path / "lists"))
    asked = len(web.requests)
    other = prepare(store, settings_for(tmp_path / "lists", sizes=[24], quality=80, rows_per_shard=9))
    assert len(web.requests) == asked
    assert other.plan != first.plan
    assert other.sizes["24"].accepted == first.sizes["16"].accepted


def test_failures_that_can_pass_are_tried_again_and_nothing_else_changes(
    web: Web, store: Store, tmp_path: Path
) -> None:
    write_list(tmp_path / "lists", web)
    settings = settings_for(tmp_path / "lists")
    first = prepare(store, settings)
    before = contents(store)
    asked = len(web.requests)
    heal(web)
    assert retry_failed(store, settings) == 8
    second = prepare(store, settings)
    assert {request.target for request in web.requests[asked:]} == {f"/{n}" for n in range(COUNT) if n % 10 in (2, 7)}
    after = contents(store)
    assert {key: after[key] for key in before} == before
    assert (second.plan, second.inputs) == (first.plan, COUNT)
    assert second.tried_again == {"rate_limited": 4, "server_error": 4}
    for size, counted in second.sizes.items():
        # Of those that came now, half have no caption.
        assert counted.accepted == first.sizes[size].accepted + 4
        assert counted.rejected == {"bad_url": 4, "gone": 4, "no_caption": 8, "opted_out": 4}
    assert verify(store, second.plan, second.edition).problems == []
    accepted = [row["key"] for row in rows_of(store, second) if row["accepted"]]
    assert len(accepted) == len(set(accepted)) == second.sizes["16"].accepted
    assert retry_failed(store, settings) == 0
    # Another size takes both generations from the originals.
    other = prepare(store, settings_for(tmp_path / "lists", sizes=[24]))
    assert (other.sizes["24"].rejected, other.tried_again) == (second.sizes["16"].rejected, second.tried_again)
    assert read_plan(store, first.plan, first.edition).rows == COUNT


def test_what_fails_again_can_be_tried_again(web: Web, store: Store, tmp_path: Path) -> None:
    write_list(tmp_path / "lists", web)
    settings = settings_for(tmp_path / "lists")
    first = prepare(store, settings)
    assert retry_failed(store, settings) == 8
    second = prepare(store, settings)
    assert second.sizes == {
        size: counted.model_copy(update={"count": second.sizes[size].count}) for size, counted in first.sizes.items()
    }
    heal(web)
    assert retry_failed(store, settings) == 8
    third = prepare(store, settings)
    assert third.sizes["16"].accepted == first.sizes["16"].accepted + 4
    assert third.tried_again == {"rate_limited": 8, "server_error": 8}


def test_what_is_tried_again_counts_once(web: Web, store: Store, tmp_path: Path) -> None:
    write_list(tmp_path / "lists", web)
    settings = settings_for(tmp_path / "lists", rows_per_shard=8)
    prepare(store, settings)
    heal(web)
    retry_failed(store, settings)
    for wanted in (settings, settings.model_copy(update={"quality": 90})):  # the second makes both generations
        seen: list[Progress] = []
        summary = prepare(store, wanted, seen.append)
        assert {progress.planned_inputs for progress in seen} == {COUNT}
        assert [progress.inputs for progress in seen] == sorted(progress.inputs for progress in seen)
        assert seen[0].inputs == (COUNT - 8 if wanted is settings else 0)
        assert seen[-1].inputs == summary.inputs == COUNT
        assert seen[-1].rejected == {size: counts.rejected for size, counts in summary.sizes.items()}
        assert seen[-1].own_inputs == (8 if wanted is settings else COUNT)
        for size, counts in summary.sizes.items():
            assert counts.accepted + sum(counts.rejected.values()) == COUNT
            assert seen[-1].accepted[size] == counts.accepted


def test_a_list_that_comes_later_is_downloaded_alone(web: Web, store: Store, tmp_path: Path) -> None:
    write_list(tmp_path / "lists", web)
    first = prepare(store, settings_for(tmp_path / "lists"))
    asked = len(web.requests)
    more = pa.table({"url": [web.url("/0?again")], "caption": ["one more"], "score": [2.0]})
    pq.write_table(more, tmp_path / "lists" / "more.parquet")
    web.pages["/0?again"] = zoo.saved(shaded(77, 40), "PNG")
    second = prepare(store, settings_for(tmp_path / "lists"))
    assert [request.target for request in web.requests[asked:]] == ["/0?again"]
    assert second.plan == first.plan
    assert second.sizes["16"].accepted == first.sizes["16"].accepted + 1


def test_originals_that_are_not_kept_are_fetched_again_for_a_second_size(
    web: Web, store: Store, tmp_path: Path
) -> None:
    write_list(tmp_path / "lists", web)
    settings = settings_for(tmp_path / "lists", keep_originals=False)
    summary = prepare(store, settings)
    assert not [entry.key for entry in store.list("data/originals/") if entry.key.endswith(".tar")]
    assert prepare(store, settings) == summary
    asked = len(web.requests)
    other = prepare(store, settings_for(tmp_path / "lists", sizes=[24]))
    assert other.sizes["24"].rejected == summary.sizes["32"].rejected
    assert len(web.requests) == asked + COUNT - 4 * len(FATES), "not for what had failed"


def test_a_shard_that_is_made_again_downloads_again_what_was_not_kept(web: Web, store: Store, tmp_path: Path) -> None:
    write_list(tmp_path / "lists", web)
    settings = settings_for(tmp_path / "lists", keep_originals=False)
    summary = prepare(store, settings)
    before, asked = without_originals(store), len(web.requests)
    store.delete(shard_key(summary.plan, "16", 0))
    store.delete(layout.PREPARED.at(plan=summary.plan, edition=summary.edition))
    assert prepare(store, settings) == summary
    assert len(web.requests) > asked
    assert without_originals(store) == before
    assert not [entry.key for entry in store.list("data/originals/") if entry.key.endswith(".tar")]


def test_the_same_originals_give_the_same_bytes_whoever_did_the_work(web: Web, store: Store, tmp_path: Path) -> None:
    write_list(tmp_path / "lists", web)
    prepare(store, settings_for(tmp_path / "lists", in_flight=1))
    other = open_store(str(tmp_path / "other"))
    prepare(other, settings_for(tmp_path / "lists", in_flight=4, fetch={"allow_private": True, "retries": 0}))
    # The originals lie in the order in which they came.
    assert without_originals(other) == without_originals(store)


def test_a_tar_of_originals_is_an_ordinary_one(store: Store, web: Web, tmp_path: Path) -> None:
    write_list(tmp_path / "lists", web)
    prepare(store, settings_for(tmp_path / "lists"))
    names = []
    for entry in store.list("data/originals/"):
        if entry.key.endswith(".tar"):
            store.download(entry.key, tmp_path / "t.tar")
            with tarfile.open(tmp_path / "t.tar") as tar:
                names += tar.getnames()
    urls = [web.url(f"/{n}") for n in range(COUNT) if n % 10 not in FATES]
    assert sorted(names) == sorted(f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.png" for url in urls)


def test_a_retry_serves_every_stage_and_source_with_the_list(web: Web, store: Store, tmp_path: Path) -> None:
    write_list(tmp_path / "lists", web)
    small, large = (settings_for(tmp_path / "lists", sizes=sizes) for sizes in ([16], [32]))
    for settings in (small, large):
        prepare(store, settings)
    heal(web)
    assert [retry_failed(store, settings) for settings in (small, large)] == [8, 0]
    accepted = [prepare(store, settings).sizes.popitem()[1].accepted for settings in (small, large)]
    assert accepted[0] == accepted[1] == 20


def test_columns_asked_for_after_a_retry_are_there(web: Web, store: Store, tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    rows = [f"{web.url(f'/{number}')},short {number},long {number}" for number in (0, 2, 3)]
    (tmp_path / "lists" / "list.csv").write_text("\n".join(["url,caption,other", *rows]))
    source = {"kind": "url_list", "name": "web", "url": str(tmp_path / "lists"), "tables": ["*.csv"]}
    settings = settings_for(tmp_path / "lists", sources=[source], sizes=[16])
    assert prepare(store, settings).sizes["16"].rejected == {"server_error": 1}
    heal(web)
    assert retry_failed(store, settings) == 1
    assert prepare(store, settings).sizes["16"].accepted == 3
    other = settings_for(tmp_path / "lists", sources=[source | {"captions": ["caption", "other"]}], sizes=[16])
    summary = prepare(store, other)
    assert summary.sizes["16"].accepted == 3
    assert {len(row["captions"]) for row in rows_of(store, summary) if row["accepted"]} == {2}
