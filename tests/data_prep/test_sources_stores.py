"""Every kind of corpus, in a store as on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.rejections import Cause
from data_prep.sources import Source
from data_prep.survey import survey
from infra.errors import StoreError
from infra.store import Store, open_store
from tests.data_prep import zoo
from tests.data_prep.test_sources import all_items, all_ranges, problem, table_folder, text_folder
from tests.data_prep.test_sources_listings import classes, image_net
from tests.data_prep.test_sources_sa1b import sa1b, write_tar
from tests.data_prep.test_sources_tables import parquet_images, url_list
from tests.data_prep.test_sources_tars import pairs, tar_bytes, web_dataset


@pytest.fixture(scope="module")
def bucket() -> Iterator[Store]:
    from moto.server import ThreadedMotoServer

    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
        server.start()
        try:
            patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
            found = open_store("s3://corpora/all")
            found._s3().create_bucket(Bucket="corpora")  # type: ignore[attr-defined]
            yield found
        finally:
            server.stop()


def corpora(folder: Path) -> list[Source]:
    """One of every kind, in one folder."""
    write_tar(folder, "sa_000000.tar", 1, 2, 3)
    pq.write_table(pa.table({"image_id": [1, 3], "caption": ["one", "three"]}), folder / "said.parquet")
    (folder / "t.tar").write_bytes(tar_bytes(*pairs(*"abc")) + b"x" * 600)
    classes(folder, "cat", "dog")
    (folder / "cat" / "1.txt").write_text("a cat")
    rows = [{"url": "https://host.example/a.jpg", "file": name, "caption": "x"} for name in ("cat/1.JPEG", "../x")]
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.table({"image": [b"%d" % n for n in range(9)], "caption": ["x"] * 9}), folder / "i.parquet")
    return [
        sa1b(folder, tars=["sa_*.tar"], tables=["said.parquet"]),
        web_dataset(folder, tars=["t.tar"]),
        image_net(folder),
        text_folder(folder),
        url_list(folder, "*.jsonl"),
        table_folder(folder, "*.jsonl", image="file"),
        parquet_images(folder, "i.*"),
    ]


def test_a_corpus_in_a_store_is_found(bucket: Store) -> None:
    apart = open_store("s3://corpora/found")
    for number in range(3):
        apart.put(f"photos/deep/{number}.jpg", zoo.saved(zoo.picture(40, 48), "JPEG"))
        apart.put(f"photos/deep/{number}.txt", b"a picture of something")
    apart.put("t.jsonl", b'{"url": "http://host.example/1.jpg", "text": "a thing"}')
    [source] = survey(f"{apart.url}/photos").sources
    assert source == {"kind": "text_folder", "name": "photos", "url": f"{apart.url}/photos"}
    [source] = survey(f"{apart.url}/t.jsonl", lookup=lambda host: []).sources
    assert (source["kind"], source["url"], source["tables"]) == ("url_list", apart.url, ["t.jsonl"])


def test_keys_that_no_store_of_ours_takes_are_refused_one_by_one(store: Store, bucket: Store) -> None:
    for key in (
        "cat/1.jpg",
        "cat//2.jpg",
        "./3.jpg",
        "cat/\x014.jpg",
        "cat/../5.jpg",
        "t.csv",
        "/6.jpg",
        "cat/7//8.txt",
    ):
        bucket._s3().put_object(Bucket="corpora", Key=f"odd/{key}", Body=b"image,caption\n")  # type: ignore[attr-defined]
    url = "s3://corpora/odd"
    source = text_folder(Path("x"), url=url, caption_suffix="")
    items = {item.name: problem(item) for item in all_items(store, source)}
    bad = dict.fromkeys(("cat//2.jpg", "./3.jpg", "cat/\x014.jpg", "cat/../5.jpg", "/6.jpg"), Cause.BAD_NAME)
    assert items == {"cat/1.jpg": None} | bad
    assert len({item.key for item in all_items(store, source)}) == 6
    assert all_items(store, table_folder(Path("x"), "*.csv", url=url)) == []
    assert [found.name for found in url_list(Path("x"), "*.csv", url=url).inputs()] == ["t.csv"]
    with pytest.raises(StoreError, match="rename the object"):
        url_list(Path("x"), "cat/**/*.txt", url=url).inputs()


def test_every_corpus_is_the_same_in_a_store_as_on_disk(folder: Path, store: Store, bucket: Store) -> None:
    here = corpora(folder)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            bucket.put(str(path.relative_to(folder)), path)
    for source in here:
        there = source.model_copy(update={"url": bucket.url})
        assert there.inputs(store) == source.inputs(store)
        assert all_ranges(store, there, 2) == all_ranges(store, source, 2)
        items = all_items(store, there, 2)
        assert items == all_items(store, source, 2)
        assert len(items) >= 2
        assert items == all_items(store, source.model_copy(update={"url": folder.as_uri()}), 2)
