"""Damaged downloads are told of, and dropped so that what needs them downloads them once more, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from data_prep.prepare import catalogue, originals
from data_prep.prepare.plan import PrepareSettings
from data_prep.upkeep.drop import drop_shared
from data_prep.upkeep.verify import originals as verified
from data_prep.upkeep.verify import verify_shared
from infra import layout
from infra.errors import StoreError
from infra.records import DataObject, put_data, read_record
from infra.shards import read_parquet
from infra.store import Store
from tests.data_prep.corpora import contents, prepare_here, retry_failed
from tests.data_prep.test_linking import asked, made, pages, photo, rows, settings_for, write
from tests.data_prep.web import Request, Stream, Web


class Prepared(NamedTuple):
    store: Store
    web: Web
    settings: PrepareSettings  # of a list of three batches, some of whose downloads failed
    other: PrepareSettings  # of one that asks for three URLs, and is linked to the first list's batches
    whole: dict[str, list[Any]]  # what becomes of the lists at another size, from originals without damage

    def batches(self) -> list[originals.BatchRecord]:
        """Of the first list, in the order of its rows."""
        found = list(originals.records(self.store, originals.states(self.store)))
        by_url = {originals.read_index(self.store, one)["url"][0].as_py(): one for one in found}
        return [by_url[self.web.url(f"/{number}")] for number in (0, 7, 14)]

    def larger(self) -> dict[str, list[Any]]:
        """Make both lists at another size, which nobody has asked for yet."""
        return {
            name: [(row["name"], row["cause"], row["pixels_sha256"]) for row in made(self.store, self._plan(one))]
            for name, one in (("first", self.settings), ("other", self.other))
        }

    def _plan(self, settings: PrepareSettings) -> Any:
        return prepare_here(self.store, settings.model_copy(update={"sizes": [16], "quality": 70}))


@pytest.fixture(autouse=True)
def several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(originals, "ROWS", 7)
    monkeypatch.setattr(catalogue, "FEW", 1)


@pytest.fixture
def prepared(store: Store, tmp_path: Path) -> Iterator[Prepared]:
    async def down(_: Request, stream: Stream) -> None:
        await stream.answer(status=503)

    with Web({f"/{number}": photo(number) for number in range(30)} | {"/9": down}) as web:
        del web.pages["/2"]
        write(tmp_path / "first", rows(web, *range(20)))
        write(tmp_path / "other", rows(web, 5, 6, 7, 8, 27, 28, 29))
        found = Prepared(
            store, web, settings_for(tmp_path / "first"), settings_for(tmp_path / "other", names=("other",)), {}
        )
        prepare_here(store, found.settings)
        prepare_here(store, found.other)
        retry_failed(store, found.settings)
        prepare_here(store, found.settings)
        catalogue.update(store)
        before = contents(store)
        found.whole.update(found.larger())
        for key in contents(store).keys() - before.keys():
            store.delete(key)
        asked(web)
        yield found


def spoil(store: Store, key: str) -> str:
    store.put(key, store.get(key)[:-1] + b"!")
    return key


def dropped(found: Prepared) -> set[str]:
    """The keys that are gone once what is damaged has been dropped."""
    before = contents(found.store)
    drop_shared(found.store, verify_shared(found.store))
    assert verify_shared(found.store).problems == []
    return before.keys() - contents(found.store).keys()


def test_nothing_is_wrong_with_what_was_downloaded(prepared: Prepared) -> None:
    found = verify_shared(prepared.store)
    assert (found.problems, found.damaged, found.batches) == ([], False, len(originals.states(prepared.store)))
    assert any(prepared.store.list(layout.CATALOGUE.under())) and found.batches == 5


def test_a_store_that_fails_while_an_index_is_read_makes_no_tar_useless(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = prepared.batches()[0]

    def failing(store: Store, table: DataObject, columns: Any) -> Any:
        if table.key == batch.index.key:
            raise StoreError("the store is away", remedy="try again")
        return read_parquet(store, table, columns)

    monkeypatch.setattr(verified, "read_parquet", failing)
    found = verify_shared(prepared.store)
    assert any("the store is away" in problem for problem in found.problems)
    before = contents(prepared.store)
    drop_shared(prepared.store, found)
    assert contents(prepared.store) == before


def gone(store: Store, key: str) -> str:
    store.delete(key)
    return key


@pytest.mark.parametrize("damage", [spoil, gone])
def test_a_damaged_tar_is_downloaded_again_where_it_is_needed(
    prepared: Prepared, damage: Callable[[Store, str], str]
) -> None:
    batch = prepared.batches()[0]
    assert batch.tar is not None and batch.rejected == {"gone": 1}
    tar = damage(prepared.store, batch.tar.key)
    found = verify_shared(prepared.store)
    assert all(problem.startswith(f"originals {batch.batch}: ") for problem in found.problems) and found.problems
    assert (found.tars_again, found.records) == ([originals.batch_key(batch.batch, 0)], [])
    assert found.objects == ([tar] if damage is spoil else [])
    dropped(prepared)
    assert prepared.larger() == prepared.whole
    assert asked(prepared.web) == pages(0, 1, 3, 4, 5, 6), "what was gone stays so"
    assert verify_shared(prepared.store).problems == []


def test_a_batch_without_its_index_is_nothing(prepared: Prepared) -> None:
    """Another list that is linked to it looks its URLs up again."""
    batch = prepared.batches()[1]
    index = spoil(prepared.store, batch.index.key)
    found = verify_shared(prepared.store)
    [problem] = found.problems
    assert problem.startswith(f"originals {batch.batch}: ") and "hash in its name" in problem
    key = originals.batch_key(batch.batch, 0)
    links = set(found.records) - {key}
    assert found.objects == [index] and found.tars_again == [] and key in found.records
    assert links and all(one.startswith(layout.LINKS.under()) for one in links)
    prepared.web.pages["/9"] = photo(9)
    assert dropped(prepared) == {key, index, *links}
    assert {name: len(found) for name, found in prepared.larger().items()} == {
        name: len(found) for name, found in prepared.whole.items()
    }
    assert asked(prepared.web) == pages(*range(7, 14))
    assert verify_shared(prepared.store).problems == []


def test_a_batchs_record_that_cannot_be_read_goes(prepared: Prepared) -> None:
    batch = prepared.batches()[2]
    prepared.store.put(originals.batch_key(batch.batch, 0), b"{not JSON")
    assert originals.batch_key(batch.batch, 0) in dropped(prepared)
    assert prepared.larger() == prepared.whole
    assert asked(prepared.web) == pages(*range(14, 20))


def test_images_that_are_not_those_of_the_index_are_found(prepared: Prepared) -> None:
    """In a tar that has the hash in its name."""
    first, second, _ = prepared.batches()
    assert second.tar is not None
    data = prepared.store.get(second.tar.key)
    wrong = put_data(prepared.store, layout.ORIGINALS.at(), f"{first.batch}.tar", data)
    record = first.model_copy(update={"tar": wrong})
    prepared.store.put(originals.batch_key(first.batch, 0), record.model_dump_json().encode())
    found = verify_shared(prepared.store)
    assert found.problems == [f"originals {first.batch}: its tar does not hold what its index says"]
    assert dropped(prepared) == {wrong.key}
    assert prepared.larger() == prepared.whole


@pytest.mark.parametrize("table", ["links", "asked"])
def test_links_that_are_damaged_are_made_again(prepared: Prepared, table: str) -> None:
    from data_prep.prepare.links import LinksRecord

    keys = [key for key in layout.LINKS.keys(prepared.store) if key.endswith("/0/links.json")]
    for key in keys:
        data = spoil(prepared.store, getattr(read_record(prepared.store, key, LinksRecord), table).key)
        assert {key, data} <= dropped(prepared)
    assert prepared.larger()["other"] == prepared.whole["other"]
    assert asked(prepared.web) == []


def test_a_damaged_catalogue_goes_and_costs_nothing(prepared: Prepared) -> None:
    [key] = [entry.key for entry in prepared.store.list(layout.CATALOGUE.under())]
    record = read_record(prepared.store, key, catalogue.CatalogueRecord)
    data = spoil(prepared.store, record.entries.key)
    assert dropped(prepared) == {key, data}
    assert prepared.larger() == prepared.whole and asked(prepared.web) == []


def test_what_a_retry_tries_again_is_told_and_stays(prepared: Prepared) -> None:
    [key] = layout.RETRY.keys(prepared.store)
    prepared.store.put(key, b"{not JSON")
    before = contents(prepared.store)
    found = verify_shared(prepared.store)
    assert (len(found.problems), found.lasting, found.damaged) == (1, 1, False)
    drop_shared(prepared.store, found)
    assert contents(prepared.store) == before
