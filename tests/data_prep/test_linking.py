"""Which URLs are asked for, and which never again: whatever becomes of the lists that name them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from data_prep.prepare import catalogue, linked, links, originals
from data_prep.prepare.downloads import Downloads, download, drop
from data_prep.prepare.job import failed_downloads, prepare
from data_prep.prepare.linking import Asking, link
from data_prep.prepare.plan import Plan, PrepareSettings, make_plan
from data_prep.rejections import Cause
from data_prep.sources import Rows, UrlList
from data_prep.web.fetch import FetchSettings
from infra import layout
from infra.config import parse
from infra.errors import DataError
from infra.records import write_record
from infra.shards import list_shards, read_index, shard_prefix
from infra.store import Store, open_store
from tests.data_prep import zoo
from tests.data_prep.corpora import contents, prepare_here, retry_failed, shaded
from tests.data_prep.web import Page, Request, Stream, Web
from tests.infra.test_store import s3, s3_store

__all__ = ["s3"]  # a fixture

LIMIT = 10_000  # bytes of a picture, where nothing else is said
Row = dict[str, Any]


@pytest.fixture(autouse=True)
def several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(originals, "ROWS", 7)


@pytest.fixture
def web() -> Iterator[Web]:
    with Web({f"/{number}": photo(number) for number in range(100)}) as web:
        yield web


def photo(number: int) -> bytes:
    return zoo.saved(shaded(number, 20), "PNG")


def rows(web: Web, *numbers: int) -> list[Row]:
    return [{"url": web.url(f"/{number}"), "caption": f"picture {number}"} for number in numbers]


def write(folder: Path, found: list[Row], name: str = "list.parquet") -> None:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(found), folder / name)


def settings_for(folder: Path, *, max_bytes: int = LIMIT, names: tuple[str, ...] = ("web",), **changes: Any) -> Any:
    source = {"kind": "url_list", "url": str(folder), "tables": ["*.parquet"], "max_bytes": max_bytes}
    fetch = {"allow_private": True, "retries": 0} | changes.pop("fetch", {})
    given = {"sources": [source | {"name": name} for name in names], "sizes": [16], "rows_per_shard": 10}
    return parse(PrepareSettings, given | {"fetch": fetch} | changes)


def made(store: Store, plan: Plan) -> list[Row]:
    """The rows of all shards of the plan's edition."""
    numbers = plan.all_numbers("16")
    shards = list_shards(store, shard_prefix(plan.digest, "16"), numbers)
    return [row for shard in shards for row in read_index(store, shard).to_pylist()]


def asked(web: Web) -> list[str]:
    """The pages that have been asked for since the last time."""
    found = sorted(request.target for request in web.requests)
    web.requests.clear()
    return found


def pages(*numbers: int) -> list[str]:
    return sorted(f"/{number}" for number in numbers)


# A list that grows, and is edited


def walk(store: Store, folder: Path, web: Web, count: int, run: Callable[[PrepareSettings], Any]) -> None:
    """Every page is asked for once, but for those that were refused for a limit that is then raised."""
    large = {7 * number for number in range(3)}
    for number in large:
        web.pages[f"/{number}"] = bytes(LIMIT + 1)
    found = rows(web, *range(count))
    write(folder, found)
    run(settings_for(folder))
    assert asked(web) == pages(*range(count))

    write(folder, [*found, *rows(web, count)])
    run(settings_for(folder))
    assert asked(web) == pages(count)

    found = [*found, *rows(web, count)]
    found[3]["caption"] = "another caption"
    write(folder, found)
    run(settings_for(folder))
    (folder / "list.parquet").rename(folder / "renamed.parquet")
    run(settings_for(folder))
    assert asked(web) == []

    run(settings_for(folder, max_bytes=2 * LIMIT))
    assert asked(web) == pages(*large)


def test_a_list_costs_what_grew(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(originals, "ROWS", 64)
    with Web({f"/{number}": photo(number % 40) for number in range(301)}) as web:
        walk(store, tmp_path / "lists", web, 300, lambda settings: prepare_here(store, of_hundreds(settings)))


def of_hundreds(settings: PrepareSettings) -> PrepareSettings:
    return settings.model_copy(update={"rows_per_shard": 200})


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.usefixtures("ray_cluster")
def test_a_list_of_a_hundred_thousand_costs_what_grew(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(originals, "ROWS", 1024)
    some = [photo(number) for number in range(20)]
    # Most are no pictures: it is the downloads that count.
    answers: dict[str, Page] = {
        f"/{number}": some[number % 20] if number % 50 < 2 else b"words" for number in range(100_001)
    }
    with Web(answers) as web:

        def run(settings: PrepareSettings) -> None:
            summary = prepare(store, settings.model_copy(update={"rows_per_shard": 5000}))
            assert summary.sizes["16"].accepted > 0.03 * summary.inputs

        walk(store, tmp_path / "lists", web, 100_000, run)
    assert len(list(store.list(layout.CATALOGUE.under()))) == 1


def test_other_orders_columns_and_names_ask_for_nothing(web: Web, store: Store, tmp_path: Path) -> None:
    numbers = [*range(30), 3, 3]
    write(tmp_path / "lists", rows(web, *numbers))
    first = prepare_here(store, settings_for(tmp_path / "lists"))
    assert asked(web) == pages(*range(30))
    shuffled = np.random.default_rng(0).permutation(numbers).tolist()
    found = [{"text": row["caption"], "picture": row["url"] + "#part"} for row in rows(web, *shuffled)]
    write(tmp_path / "others", found, "other.parquet")
    other = settings_for(tmp_path / "others", names=("other",))
    other = other.model_copy(
        update={"sources": [other.sources[0].model_copy(update={"image": "picture", "captions": ["text"]})]}
    )
    second = prepare_here(store, other)
    assert asked(web) == []
    pixels = {row["name"]: row["pixels_sha256"] for row in made(store, first)}
    assert len(set(pixels.values())) == 30
    again = [(row["name"].partition("#")[0], row["pixels_sha256"]) for row in made(store, second)]
    assert again == [(web.url(f"/{number}"), pixels[web.url(f"/{number}")]) for number in shuffled]


def test_a_url_in_many_places_is_asked_for_once(web: Web, store: Store, tmp_path: Path) -> None:
    """Twice in one table, in two tables, under two sources, with limits that let it through, and in other spellings."""
    folder = tmp_path / "lists"
    write(folder, [*rows(web, 1, 2, 1), {"url": web.url("/2#x"), "caption": "x"}], "a.parquet")
    other = f" {web.url('/1').replace('http', 'HTTP')} "
    write(folder, [*rows(web, 2, 3), {"url": other, "caption": "x"}], "b.parquet")
    settings = settings_for(folder, names=("one", "two"))
    narrow = settings.sources[1].model_copy(update={"max_bytes": LIMIT - 1})
    plan = prepare_here(store, settings.model_copy(update={"sources": [settings.sources[0], narrow]}))
    assert asked(web) == pages(1, 2, 3)
    assert [row["accepted"] for row in made(store, plan)] == [True] * 14


# Settings


def special(request: str) -> Callable[[Request, Stream], Any]:
    async def page(asked: Request, stream: Stream) -> None:
        if request == "wish":
            await stream.answer(photo(1), X_Robots_Tag="noai")
        elif request == "redirect":
            await stream.answer(status=302, Location="/1")
        elif request == "agent" and not asked.headers["user-agent"].startswith("welcome/"):
            await stream.answer(status=403)
        else:
            await stream.answer(photo(1))

    return page


# What the page does -> strict settings, lax ones, what becomes of it under strict ones.
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], Cause]] = {
    "large": ({"max_bytes": 100}, {"max_bytes": LIMIT}, Cause.TOO_MANY_BYTES),
    "redirect": ({"fetch": {"redirects": 0}}, {}, Cause.TOO_MANY_REDIRECTS),
    "wish": ({}, {"fetch": {"opt_out": False}}, Cause.OPTED_OUT),
}


@pytest.mark.parametrize("what", CHANGES)
def test_limits_refuse_what_is_there_and_raised_ones_ask_for_what_they_refused(
    web: Web, store: Store, tmp_path: Path, what: str
) -> None:
    narrow, wide, cause = CHANGES[what]
    strict, lax = (settings_for(tmp_path / "lists", **changes) for changes in (narrow, wide))
    for number in range(2, 20):  # small enough for every limit, and no pictures
        web.pages[f"/{number}"] = b"words"
    web.pages["/50"] = special(what)
    write(tmp_path / "lists", rows(web, 50, *range(2, 20)))
    hops = ["/1"] if what == "redirect" else []

    def fate(settings: PrepareSettings) -> Any:
        return made(store, prepare_here(store, settings))[0]["cause"]

    assert fate(strict) == cause
    assert asked(web) == pages(50, *range(2, 20))
    assert fate(lax) is None
    assert asked(web) == sorted(["/50", *hops])
    others = [settings.model_copy(update={"quality": 90}) for settings in (strict, lax)]
    (tmp_path / "lists" / "list.parquet").rename(tmp_path / "lists" / "renamed.parquet")
    assert [fate(settings) for settings in others] == [cause, None]
    assert asked(web) == []
    # From what was fetched under lax settings to begin with.
    (tmp_path / "lists" / "renamed.parquet").unlink()
    web.pages["/60"] = special(what)
    write(tmp_path / "lists", rows(web, 60, 2))
    assert fate(lax) is None
    assert asked(web) == sorted(["/60", *hops])
    assert fate(strict) == cause
    assert asked(web) == []


def test_private_addresses_are_refused_from_what_is_there_as_well(web: Web, store: Store, tmp_path: Path) -> None:
    write(tmp_path / "lists", rows(web, *range(5)))
    closed, opened = (settings_for(tmp_path / "lists", fetch={"allow_private": on}) for on in (False, True))
    for settings, causes, requests in (
        (closed, {"private_address"}, []),
        (opened, {None}, pages(*range(5))),
        (closed.model_copy(update={"quality": 90}), {"private_address"}, []),
        (opened.model_copy(update={"quality": 90}), {None}, []),
    ):
        assert {row["cause"] for row in made(store, prepare_here(store, settings))} == causes
        assert asked(web) == requests
    (tmp_path / "lists" / "list.parquet").rename(tmp_path / "lists" / "renamed.parquet")
    found = {row["cause"]: row["detail"] for row in made(store, prepare_here(store, closed))}
    assert found == {"private_address": "127.0.0.1"}


def test_another_agent_asks_again_where_the_first_was_shown_out(web: Web, store: Store, tmp_path: Path) -> None:
    web.pages["/50"] = special("agent")
    write(tmp_path / "lists", rows(web, 50, 1, 2, 999))
    first = prepare_here(store, settings_for(tmp_path / "lists"))
    assert [row["cause"] for row in made(store, first)] == ["http_error", None, None, "gone"]
    asked(web)
    second = prepare_here(store, settings_for(tmp_path / "lists", fetch={"user_agent": "welcome"}))
    assert [row["cause"] for row in made(store, second)] == [None, None, None, "gone"]
    assert asked(web) == ["/50"]


def test_what_failed_is_asked_for_again_when_that_is_wished_and_never_else(
    web: Web, store: Store, tmp_path: Path
) -> None:
    async def down(_: Request, stream: Stream) -> None:
        await stream.answer(status=503)

    web.pages["/1"] = down
    write(tmp_path / "lists", rows(web, 1, 2))
    prepare_here(store, settings_for(tmp_path / "lists"))
    asked(web)
    web.pages["/1"] = photo(1)
    write(tmp_path / "lists", rows(web, 2, 1, 3))
    settings = settings_for(tmp_path / "lists")
    assert [row["cause"] for row in made(store, prepare_here(store, settings))] == [None, "server_error", None]
    assert asked(web) == ["/3"]
    assert retry_failed(store, settings) == 1
    assert made(store, prepare_here(store, settings))[-1]["row"] == 1
    assert asked(web) == ["/1"]
    # What came then is there for every other list.
    write(tmp_path / "lists", rows(web, 1, 2, 3), "more.parquet")
    plan = prepare_here(store, settings)
    assert [row["cause"] for row in made(store, plan)] == [None, "server_error", None, None, None, None, None]
    assert asked(web) == []


def test_a_retry_asks_for_what_another_has_not_fetched(web: Web, store: Store, tmp_path: Path) -> None:
    async def down(_: Request, stream: Stream) -> None:
        await stream.answer(status=503)

    web.pages |= {"/1": down, "/2": down}
    settings = {}
    for name, numbers in (("a", (1, 3)), ("b", (1, 2, 1))):
        write(tmp_path / name, rows(web, *numbers))
        settings[name] = settings_for(tmp_path / name, names=(name,))
        prepare_here(store, settings[name])
    assert asked(web) == pages(1, 2, 3)
    web.pages |= {"/1": photo(1), "/2": photo(2)}
    assert retry_failed(store, settings["a"]) == 1
    prepare_here(store, settings["a"])
    assert asked(web) == ["/1"]
    assert retry_failed(store, settings["b"]) == 3
    assert [row["cause"] for row in made(store, prepare_here(store, settings["b"]))][3:] == [None] * 3
    assert asked(web) == ["/2"]


def test_a_refused_retry_has_begun_nothing(web: Web, store: Store, tmp_path: Path) -> None:
    async def down(_: Request, stream: Stream) -> None:
        await stream.answer(status=503)

    web.pages["/1"] = down
    write(tmp_path / "lists", rows(web, 1, 2), "a.parquet")
    settings = settings_for(tmp_path / "lists")
    with pytest.raises(DataError, match="none of the downloads has been begun"):
        retry_failed(store, settings)
    assert contents(store) == {}
    prepare_here(store, settings)
    write(tmp_path / "lists", rows(web, *range(10, 30)), "b.parquet")
    plan = make_plan(store, settings)
    downloads = Downloads(store, settings, plan, plan.shards)
    download(store, settings.fetch, downloads.works[0], keep=True)
    before = contents(store)
    with pytest.raises(DataError, match=r"downloads of b\.parquet are not finished"):
        retry_failed(store, settings)
    assert contents(store) == before
    prepare_here(store, settings)
    before = contents(store)
    assert [len(retry.failed) for retry in failed_downloads(store, settings)] == [1, 0]
    assert contents(store) == before
    assert retry_failed(store, settings) == 1


# Interruptions


def half(store: Store, settings: PrepareSettings) -> None:
    """A driver that is killed when half of its downloads are there."""
    plan = make_plan(store, settings)
    works = Downloads(store, settings, plan, plan.shards).works
    for work in works[: len(works) // 2]:
        download(store, settings.fetch, work, keep=True)


def test_a_list_that_is_edited_half_way_goes_on_with_the_other_half(web: Web, store: Store, tmp_path: Path) -> None:
    write(tmp_path / "lists", rows(web, *range(42)))
    half(store, settings_for(tmp_path / "lists"))
    assert asked(web) == pages(*range(21))
    found = rows(web, *range(40), 77)
    found[0]["caption"] = "another"
    write(tmp_path / "lists", found)
    plan = prepare_here(store, settings_for(tmp_path / "lists"))
    assert asked(web) == pages(*range(21, 40), 77), "and not for 40 and 41, which it no longer names"
    assert all(row["accepted"] for row in made(store, plan))


def test_what_a_list_awaits_from_another_comes_without_it(web: Web, store: Store, tmp_path: Path) -> None:
    """The second list's links name batches of the first one's, which is gone before they were downloaded."""
    write(tmp_path / "lists", rows(web, *range(30)), "a.parquet")
    write(tmp_path / "lists", rows(web, *range(0, 30, 5), 50), "b.parquet")
    half(store, settings_for(tmp_path / "lists"))
    (tmp_path / "lists" / "a.parquet").unlink()
    plan = prepare_here(store, settings_for(tmp_path / "lists"))
    assert [row["origin"] for row in made(store, plan)] == [web.url(f"/{n}") for n in (*range(0, 30, 5), 50)]
    assert asked(web) == pages(*range(28), 50), "the batches that it needs, and each page once"


def test_two_that_link_at_once_agree(web: Web, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else has linked the second list, and more of the web is there, when this one comes to write it."""
    write(tmp_path / "lists", rows(web, *range(10)), "a.parquet")
    write(tmp_path / "lists", rows(web, *range(5, 20)), "b.parquet")
    write(tmp_path / "lists", rows(web, *range(15, 30)), "c.parquet")
    settings = settings_for(tmp_path / "lists")
    create, others = store.create, list[Plan]()

    def slower(key: str, data: bytes | Path) -> bool:
        if key.endswith("links.json") and not others:
            monkeypatch.setattr(store, "create", create)
            alone = settings.sources[0].model_copy(update={"tables": ["b.parquet"]})
            others.append(prepare_here(store, settings.model_copy(update={"sources": [alone]})))
        return create(key, data)

    monkeypatch.setattr(store, "create", slower)
    plan = prepare_here(store, settings)
    assert [row["origin"] for row in made(store, plan)] == [
        web.url(f"/{n}") for n in (*range(10), *range(5, 20), *range(15, 30))
    ]
    assert all(row["accepted"] for row in made(store, plan))
    assert set(asked(web)) == set(pages(*range(30)))
    assert prepare_here(store, settings) == plan
    assert asked(web) == []


def test_links_stay_whatever_is_downloaded_later(web: Web, store: Store, tmp_path: Path) -> None:
    """Another size is made of the same originals as the first, though a newer one would be found by now."""
    write(tmp_path / "lists", rows(web, 1, 2))
    settings = settings_for(tmp_path / "lists")
    first = made(store, prepare_here(store, settings))
    for entry in [*store.list(layout.BATCH.under())]:  # as if two drivers had asked at once
        record = originals.read_batch(store, entry.key.split("/")[2].split(".")[0], 0)
        other = record.model_copy(update={"batch": f"{int(record.batch, 16) ^ 1:032x}", "began": "9999-01-01"})
        write_record(store, originals.batch_key(other.batch, 0), other)
    again = made(store, prepare_here(store, settings.model_copy(update={"quality": 90})))
    assert [row["pixels_sha256"] for row in again] == [row["pixels_sha256"] for row in first]
    (place,) = {entry.key.split("/")[2] for entry in store.list(layout.LINKS.under())}
    write(tmp_path / "lists", rows(web, 2, 1))
    prepare_here(store, settings)
    (newer,) = {entry.key.split("/")[2] for entry in store.list(layout.LINKS.under())} - {place}
    used = {at: batches_of(store, links.At(at)) for at in (place, newer)}
    assert used[place].isdisjoint(used[newer])
    assert asked(web) == pages(1, 2)


def batches_of(store: Store, at: links.At) -> set[str]:
    record = links.read_links(store, at)
    assert record is not None
    with links.opened(store, record) as file:
        return set(file.slice(0, record.rows).names)


# What was not kept


def test_what_was_dropped_is_fetched_again_where_it_is_needed(web: Web, store: Store, tmp_path: Path) -> None:
    fails = {3: 404, 4: 503}

    async def failing(request: Request, stream: Stream) -> None:
        await stream.answer(status=fails[int(request.target[1:])])

    web.pages |= {"/3": failing, "/4": failing}
    write(tmp_path / "lists", rows(web, *range(10)))
    settings = settings_for(tmp_path / "lists", keep_originals=False)
    plan = prepare_here(store, settings)
    before = made(store, plan)
    drop(store, settings, plan)
    assert not [entry.key for entry in store.list(layout.ORIGINALS.at()) if entry.key.endswith(".tar")]
    asked(web)
    web.pages |= {"/3": photo(3), "/4": photo(4)}
    other = prepare_here(store, settings_for(tmp_path / "lists", quality=90))
    assert asked(web) == pages(0, 1, 2, *range(5, 10)), "what had failed stays what it was"
    same = [(row["cause"], row["pixels_sha256"]) for row in before]
    assert [(row["cause"], row["pixels_sha256"]) for row in made(store, other)] == same
    # A list that needs one of those that failed, and none of those that came, asks for nothing.
    drop(store, settings, plan)
    write(tmp_path / "few", rows(web, 3, 4))
    few = prepare_here(store, settings_for(tmp_path / "few"))
    assert [row["cause"] for row in made(store, few)] == ["gone", "server_error"]
    assert asked(web) == []
    # And one that needs two of those that came asks for these.
    write(tmp_path / "two", rows(web, 3, 5, 6))
    two = prepare_here(store, settings_for(tmp_path / "two"))
    assert [row["cause"] for row in made(store, two)] == ["gone", None, None]
    assert asked(web) == pages(5, 6)


ASKED = st.builds(
    originals.asked_with,
    st.builds(
        FetchSettings,
        redirects=st.integers(0, 3),
        opt_out=st.booleans(),
        robots=st.booleans(),
        allow_private=st.booleans(),
        allow_networks=st.sampled_from([[], ["10.0.0.0/8"], ["10.0.0.0/8", "172.16.0.0/12"]]),
        allow_metadata=st.booleans(),
        user_agent=st.sampled_from("ab"),
    ),
    st.integers(1, 4),
)


@given(then=ASKED, again=ASKED, now=ASKED)
def test_what_was_asked_for_twice_is_reopened_where_either_is(
    then: originals.Asked, again: originals.Asked, now: originals.Asked
) -> None:
    both = originals.reopened(originals.either(then, again), now)
    assert both >= originals.reopened(then, now) | originals.reopened(again, now)
    assert originals.reopened(now, now) == set()
    assert originals.reopened(originals.either(then, then), now) == originals.reopened(then, now)


def test_what_others_keep_is_not_dropped(web: Web, store: Store, tmp_path: Path) -> None:
    write(tmp_path / "kept", rows(web, *range(7)))
    prepare_here(store, settings_for(tmp_path / "kept"))
    write(tmp_path / "lists", rows(web, *range(10)))
    half(store, settings_for(tmp_path / "lists", names=("killed",), keep_originals=False))
    settings = settings_for(tmp_path / "lists", keep_originals=False)
    drop(store, settings, prepare_here(store, settings))
    asked(web)
    prepare_here(store, settings_for(tmp_path / "kept", quality=90))
    assert asked(web) == []


def test_a_tar_that_somebody_deleted_is_fetched_once_more(web: Web, store: Store, tmp_path: Path) -> None:
    write(tmp_path / "lists", rows(web, *range(10)))
    prepare_here(store, settings_for(tmp_path / "lists"))
    asked(web)
    tars = [entry.key for entry in store.list(layout.ORIGINALS.at()) if entry.key.endswith(".tar")]
    store.delete(tars[0])
    with pytest.raises(DataError, match=r"originals .* are gone") as error:
        prepare_here(store, settings_for(tmp_path / "lists", quality=90))
    assert error.value.remedy == "run again: then they are downloaded once more"
    plan = prepare_here(store, settings_for(tmp_path / "lists", quality=90))
    assert all(row["accepted"] for row in made(store, plan))
    assert len(asked(web)) in (3, 7)


@pytest.mark.parametrize("table", ["links", "asked"])
@pytest.mark.parametrize("damage", [None, b"PAR1"])
def test_what_tells_of_a_lists_downloads_can_be_lost(
    web: Web, store: Store, tmp_path: Path, table: str, damage: bytes | None
) -> None:
    write(tmp_path / "lists", rows(web, *range(10)))
    half(store, settings_for(tmp_path / "lists"))
    (key,) = [entry.key for entry in store.list(f"{layout.ORIGINALS.at()}/{table}-")]
    store.delete(key) if damage is None else store.put(key, damage)
    with pytest.raises(DataError, match=rf"{key}.* is gone or damaged") as error:
        prepare_here(store, settings_for(tmp_path / "lists"))
    (record,) = [entry.key for entry in store.list(layout.LINKS.under())]
    assert error.value.remedy.startswith(f"delete {store.url}/{record}, and run again")
    store.delete(record)
    prepare_here(store, settings_for(tmp_path / "lists"))
    assert asked(web) == pages(*range(10))


# Where they lie


def test_a_list_that_changes_under_the_job_is_told(web: Web, store: Store, tmp_path: Path) -> None:
    write(tmp_path / "lists", rows(web, *range(10)))
    settings = settings_for(tmp_path / "lists")
    plan = make_plan(store, settings)
    downloads = Downloads(store, settings, plan, plan.shards)
    write(tmp_path / "lists", rows(web, *range(1, 11)))
    for work in downloads.works:
        download(store, settings.fetch, work, keep=True)
    assert asked(web) == pages(*range(10)), "what was planned"
    with pytest.raises(DataError, match=r"list\.parquet has changed since it was planned"):
        prepare_here(store, settings, plan)


def test_a_hash_that_two_urls_share_gives_nobody_anothers_picture(
    web: Web, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weak(url: str) -> bytes:
        return bytes(15) + bytes([1 + int(url.rpartition("/")[2]) % 3])

    for module in (originals, catalogue, linked):
        monkeypatch.setattr(module, "url_hash", weak)
    write(tmp_path / "lists", rows(web, *range(9)))
    plan = prepare_here(store, settings_for(tmp_path / "lists"))
    found = made(store, plan)
    assert [row["cause"] for row in found] == [None] * 3 + ["bad_url"] * 6
    assert {row["detail"] for row in found[3:]} == {"its hash is that of another one"}
    assert asked(web) == pages(0, 1, 2)


def test_scattered_originals_are_read_from_a_server_as_from_a_folder(
    s3: str, web: Web, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linked, "MANY", 3)
    monkeypatch.setattr(linked, "WINDOW", 11)
    numbers = np.random.default_rng(1).permutation(60).tolist()
    write(tmp_path / "lists", rows(web, *range(60)))
    far = s3_store(f"http://{s3}")
    for where in (store, far):
        prepare_here(where, settings_for(tmp_path / "lists"))
    write(tmp_path / "others", rows(web, *numbers[:20], *range(30, 60), *numbers[20:], 1, 1))
    asked(web)
    plans = [prepare_here(where, settings_for(tmp_path / "others", names=("other",))) for where in (store, far)]
    assert asked(web) == []
    assert plans[0] == plans[1]
    assert made(store, plans[0]) == made(far, plans[1])


# The catalogue


def test_a_catalogue_is_written_when_much_has_come_and_finds_the_same(
    web: Web, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "FEW", 3)
    write(tmp_path / "lists", rows(web, *range(14)))
    prepare_here(store, settings_for(tmp_path / "lists"))
    catalogue.update(store)
    assert [*store.list(layout.CATALOGUE.under())] == [], "two batches are few"
    write(tmp_path / "lists", rows(web, *range(40), 999), "more.parquet")
    prepare_here(store, settings_for(tmp_path / "lists"))
    catalogue.update(store)
    (first,) = [entry.key for entry in store.list(layout.CATALOGUE.under())]
    asked(web)
    read, get = list[str](), store.get

    def noted(key: str, *where: int) -> bytes:
        read.append(key)
        return get(key, *where)

    write(tmp_path / "others", rows(web, 50, *range(40), 999))
    with monkeypatch.context() as patch:
        patch.setattr(store, "get", noted)
        plan = make_plan(store, settings_for(tmp_path / "others"))
        Downloads(store, settings_for(tmp_path / "others"), plan, plan.shards)
    assert not [key for key in read if key.startswith(layout.BATCH.under())]
    found = made(store, prepare_here(store, settings_for(tmp_path / "others")))
    assert [row["cause"] for row in found] == [None] * 41 + ["gone"]
    assert asked(web) == ["/50"]
    catalogue.update(store)
    assert [entry.key for entry in store.list(layout.CATALOGUE.under())] == [first]
    write(tmp_path / "lists", rows(web, *range(50, 80)), "third.parquet")
    prepare_here(store, settings_for(tmp_path / "lists"))
    catalogue.update(store)
    (second,) = [entry.key for entry in store.list(layout.CATALOGUE.under())]
    assert (first, second) == tuple(f"{layout.CATALOGUE.under()}{number:05d}.json" for number in range(2))


@pytest.mark.parametrize("damage", ["record", "entries", "batches"])
def test_a_damaged_catalogue_is_none(
    web: Web, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(catalogue, "FEW", 1)
    write(tmp_path / "lists", rows(web, *range(20)))
    prepare_here(store, settings_for(tmp_path / "lists"))
    catalogue.update(store)
    (key,) = [entry.key for entry in store.list(layout.CATALOGUE.under())]
    if damage == "record":
        store.put(key, b"{")
    else:
        name = json.loads(store.get(key))[damage]["key"]
        store.put(name, store.get(name)[:-1] + b"!")
    asked(web)
    write(tmp_path / "lists", rows(web, *range(21)))
    prepare_here(store, settings_for(tmp_path / "lists"))
    assert asked(web) == ["/20"]
    monkeypatch.setattr(catalogue, "SHARE", 10**9)
    catalogue.update(store)
    assert [entry.key for entry in store.list(layout.CATALOGUE.under())] == [f"{layout.CATALOGUE.under()}00001.json"]


@given(
    known=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1), st.integers(-9, -1)), max_size=20),
    wanted=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1)), min_size=1, max_size=20),
)
def test_the_best_of_what_is_known_is_found_or_the_first_row_that_asks(
    known: list[tuple[int, int, int]], wanted: list[tuple[int, int]]
) -> None:
    there = np.zeros(len(known), catalogue.Known)
    for number, (high, low, _) in enumerate(known):
        there[number]["high"], there[number]["low"] = high, low
    rows = np.array([(high, low, number) for number, (high, low) in enumerate(wanted)], catalogue.Wanted)
    preference = np.array([preference for *_, preference in known], np.int64)
    found = catalogue.joined(there, preference, rows).tolist()
    for row, place in enumerate(found):
        same = [number for number, (*key, _) in enumerate(known) if tuple(key) == wanted[row]]
        if same:
            assert known[place][:2] == wanted[row]
            assert known[place][2] == min(known[number][2] for number in same)
        else:
            assert place - len(known) == wanted.index(wanted[row])


# Any history


STEP = st.tuples(
    st.lists(st.integers(0, 9), min_size=1, max_size=12),
    st.sampled_from([250, 450, 650]),
    st.sampled_from(["", "catalogue", "killed", "retry"]),
)


@examples(max_examples=15)
@given(steps=st.lists(STEP, min_size=1, max_size=5))
def test_whatever_comes_nothing_is_asked_for_without_need(
    steps: list[tuple[list[int], int, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Against a model in plain words: a page is asked for if it never was, or if it was refused for a lower limit."""
    folder = tmp_path_factory.mktemp("history")
    store = open_store(str(folder / "store"))

    async def down(_: Request, stream: Stream) -> None:
        await stream.answer(status=503)

    sizes = {number: 100 * number for number in range(1, 9)}
    answers: dict[str, Any] = {f"/{number}": bytes(size) for number, size in sizes.items()} | {"/0": down}
    refused: dict[int, int] = {}  # page -> the limit that it was refused for, or 0 for those that need never be asked
    with Web(answers) as web, pytest.MonkeyPatch.context() as patch:
        patch.setattr(originals, "ROWS", 3)
        patch.setattr(catalogue, "FEW", 1)
        for number, (names, limit, then) in enumerate(steps):
            (folder / str(number)).mkdir()
            write(folder / str(number), rows(web, *names))
            settings = settings_for(folder / str(number), max_bytes=limit, names=(f"s{number}",))
            if then == "killed":
                half(store, settings)
            plan = prepare_here(store, settings)
            due = {page for page in names if page not in refused or 0 < refused[page] < limit}
            assert asked(web) == pages(*due)
            for page in due:
                refused[page] = limit if sizes.get(page, 0) > limit else 0
            causes = {0: "server_error", 9: "gone"}
            causes |= {page: "too_many_bytes" if size > limit else "unknown_format" for page, size in sizes.items()}
            assert [row["cause"] for row in made(store, plan)] == [causes[page] for page in names]
            if then == "catalogue":
                catalogue.update(store)
            if then == "retry":
                assert retry_failed(store, settings) == names.count(0)
                prepare_here(store, settings)
                assert asked(web) == ["/0"] * (0 in names)


def test_lists_with_one_place_are_linked_once(web: Web, store: Store, tmp_path: Path) -> None:
    write(tmp_path / "lists", rows(web, 1, 2))
    settings = settings_for(tmp_path / "lists", names=("one", "two"))
    plan = make_plan(store, settings)
    sources = [source for source in settings.sources if isinstance(source, UrlList)]
    asking = [
        Asking(source, settings.at(shard.known_as), shard.part)
        for source, shard in zip(sources, plan.shards, strict=True)
        if isinstance(shard.part, Rows)
    ]
    assert len(asking) == 2
    assert len({each.at for each in asking}) == len(link(store, settings.fetch, asking)) == 1
