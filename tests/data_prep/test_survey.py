"""What is found of a corpus must be what the sources then read: each kind, in the shapes that people have it in."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.prepare.plan import PrepareSettings
from data_prep.sources.base import RawItem, Url
from data_prep.survey import Survey, Wanted, name_of, place, survey
from infra.config import parse
from infra.errors import DataError, PixnerdError, SettingsError
from infra.store import Store
from tests.data_prep import zoo
from tests.data_prep.corpora import HUGGING_FACE_IMAGE, shaded, write_as_datasets
from tests.data_prep.test_sources import all_items, problem, said
from tests.data_prep.test_sources_packed import PACKERS
from tests.data_prep.test_sources_tars import member, tar_bytes

WORDS = [f"a photo of the thing number {number}" for number in range(6)]
PHOTO = zoo.saved(shaded(1, 40), "JPEG")


def found_in(path: Path | str, **wanted: Any) -> Survey:
    return survey(
        str(path), Wanted(**wanted), lookup=lambda host: {"inside": ["10.0.0.7"]}.get(host, ["93.184.215.14"])
    )


def items_of(found: Survey, store: Store) -> list[RawItem]:
    """What the sources of the recipe make of it."""
    settings = parse(PrepareSettings, {"sources": found.sources, "sizes": [16]})
    return [item for source in settings.sources for item in all_items(store, source)]


def check(found: Survey, store: Store, kind: str, captions: list[str] = WORDS) -> dict[str, Any]:
    """All items are there with their pictures and words; the source's settings."""
    items = items_of(found, store)
    assert [text for item in items for _, text in said(item)] == captions
    assert [problem(item) for item in items] == [None] * len(captions)
    assert (found.pictures, found.warnings) == (len(captions), [])
    [source] = found.sources
    assert source["kind"] == kind
    return source


def photos(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(PHOTO)


def numbered(folder: Path, name: str = "{}.jpg") -> list[str]:
    names = [name.format(number) for number in range(len(WORDS))]
    photos(folder, *names)
    return names


def refused(path: Path | str, says: str, error: type[PixnerdError] = DataError, **wanted: Any) -> PixnerdError:
    with pytest.raises(error, match=says) as told:
        found_in(path, **wanted)
    return told.value


# Folders of pictures


@pytest.mark.parametrize("suffix", [".txt", ".TXT", ".caption"])
def test_captions_beside_the_pictures(folder: Path, store: Store, suffix: str) -> None:
    for name, words in zip(numbered(folder, "deep/{}.jpg"), WORDS, strict=True):
        (folder / name).with_suffix(suffix).write_text(words + "\n")
    found = found_in(folder)
    source = check(found, store, "text_folder")
    assert source.get("caption_suffix", ".txt") == suffix.lower()
    assert (found.shorter_side, found.words, found.longest, found.counted) == (40, 7.0, 7, True)


def test_pictures_without_a_caption_are_told_of(folder: Path) -> None:
    for name in numbered(folder)[:4]:
        (folder / name).with_suffix(".txt").write_text("words")
    assert found_in(folder).warnings == ["2 of 6 pictures have no .txt beside them: they are refused"]


def test_without_any_caption_the_way_out_is_told(folder: Path) -> None:
    numbered(folder)
    error = refused(folder, "the 6 pictures of .* have no captions")
    assert "into 0.txt beside it" in error.remedy
    assert '{"file_name": "0.jpg", "text": "..."}' in error.remedy


def test_folders_of_classes_give_captions_of_a_kind(folder: Path, store: Store) -> None:
    photos(folder, "red_fox/1.jpg", "red_fox/2.jpg", "owl/1.jpg")
    found = found_in(folder)
    assert [text for item in items_of(found, store) for _, text in said(item)] == [
        "a photo of a owl",
        "a photo of a red fox",
        "a photo of a red fox",
    ]
    assert found.warnings[0].startswith("no captions: they are made of the names of 2 folders (")


def test_pictures_in_train_and_test_are_no_classes(folder: Path) -> None:
    photos(folder, "train/1.jpg", "test/1.jpg")
    refused(folder, "have no captions")


def test_pictures_that_nobody_can_read_are_told_of(folder: Path) -> None:
    for name in numbered(folder):
        (folder / name).write_bytes(b"<html>")
        (folder / name).with_suffix(".txt").write_text("words")
    refused(folder, r"none of the first 6 pictures of .* can be read \(unknown_format, HTML\)")


# Tables that name pictures


def test_the_layout_of_hugging_faces_imagefolder(folder: Path, store: Store) -> None:
    for part, numbers in (("test", (0, 1)), ("train", (2, 3, 4, 5))):
        photos(folder / part, *(f"{number}.jpg" for number in numbers))
        rows = [{"file_name": f"{number}.jpg", "text": WORDS[number]} for number in numbers]
        (folder / part / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = found_in(folder)
    assert [source["name"] for source in found.sources] == ["test", "train"]
    assert [text for item in items_of(found, store) for _, text in said(item)] == WORDS


@pytest.mark.parametrize("named", ["{}.jpg", "pictures/{}.jpg"])
def test_a_table_beside_the_folder_of_the_pictures(folder: Path, store: Store, named: str) -> None:
    numbered(folder, "pictures/{}.jpg")
    lines = [f"{named.format(number)},{words},2024-01-0{number + 1}" for number, words in enumerate(WORDS)]
    (folder / "list.csv").write_text("file,What it shows,taken\n" + "\n".join(lines))
    source = check(found_in(folder), store, "table_folder")
    assert source["captions"] == ["What it shows"]


def test_a_table_that_names_nothing_there_is_told_of(folder: Path) -> None:
    (folder / "list.csv").write_text("file,text\n" + "\n".join(f"{number}.jpg,a b c" for number in range(9)))
    error = refused(folder, "no table of .* names, holds or links to pictures")
    assert "--image COLUMN" in error.remedy


# Lists of URLs


def write_urls(folder: Path, suffix: str, host: str = "host.example") -> None:
    rows = [
        {
            "sku": f"A{number}",
            "page": f"https://{host}/p/{number}",
            "picture": f"http://{host}/{number}.jpg",
            "note": words,
        }
        for number, words in enumerate(WORDS)
    ]
    kind, _, packing = suffix.partition(".")
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
        return
    if kind in ("csv", "tsv"):
        comma = "," if kind == "csv" else "\t"
        text = "\n".join([comma.join(rows[0]), *(comma.join(row.values()) for row in rows)])
    else:
        text = "\n".join(map(json.dumps, rows)) if kind == "jsonl" else json.dumps(rows, indent=1)
    data = text.encode()
    (folder / f"t.{suffix}").write_bytes(PACKERS[f".{packing}"](data) if packing else data)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet", "jsonl.gz", "csv.zst", "json.bz2"])
def test_a_list_of_urls(folder: Path, store: Store, suffix: str) -> None:
    write_urls(folder, suffix)
    found = found_in(folder / f"t.{suffix}")
    source = check(found, store, "url_list")
    assert (source["image"], source["captions"], source["tables"]) == ("picture", ["note"], [f"t.{suffix}"])
    assert found.remarks[0]["image"] == "the column of URLs; also there: page"
    assert all(isinstance(item.image, Url) for item in items_of(found, store))
    assert found.hosts is not None and found.hosts.public == ["host.example"]
    assert found.shorter_side is None


def test_a_table_whose_first_line_names_no_columns(folder: Path, store: Store) -> None:
    """As Google's Conceptual Captions come."""
    lines = [f"http://host.example/{number}.jpg\t{words}" for number, words in enumerate(WORDS)]
    (folder / "cc12m.tsv").write_text("\n".join(lines))
    source = check(found_in(folder), store, "url_list")
    assert (source["header"], source["image"]) == (["column1", "column2"], "column1")


def test_json_that_is_no_table_hides_nothing(folder: Path, store: Store) -> None:
    """What img2dataset and others write beside their pictures and tables."""
    write_urls(folder, "jsonl")
    (folder / "stats.json").write_text(json.dumps({"url": "http://host.example/1.jpg", "caption": "a b c d"}))
    for number in range(70):
        (folder / f"deep{number}").mkdir()
        (folder / f"deep{number}" / "a.json").write_text(json.dumps({"url": "http://host.example/1.jpg"}, indent=1))
    check(found_in(folder), store, "url_list")


def test_where_urls_lead_is_told(folder: Path) -> None:
    write_urls(folder, "csv", host="inside")
    hosts = found_in(folder).hosts
    assert hosts is not None and (hosts.private, hosts.public) == (["inside"], [])


def test_hosts_are_looked_up_without_waiting_for_ever() -> None:
    from data_prep.survey import hosts

    def lookup(host: str) -> list[str]:
        if host == "gone":
            raise OSError("no such host")
        return ["10.0.0.1", "93.184.215.14"]

    urls = [
        "http://gone/1",
        "http://two/1",
        "http://192.168.1.9/1",
        "http://[::1]:80/x",
        "ftp://nobody/x",
        "http://2130706433/",
    ]
    found = hosts.hosts_of(urls, lambda host: [host] if host[0].isdigit() or ":" in host else lookup(host))
    assert found.unknown == ["gone"]
    assert set(found.private) == {"two", "192.168.1.9", "::1", "127.0.0.1"}, "one address inside is enough"
    assert found.fetch == {"allow_private": True, "allow_networks": ["10.0.0.1", "192.168.1.9"]}


# Parquet with pictures


def write_hugging_face(path: Path, names: list[str | None], data: list[bytes | None], **columns: Any) -> None:
    images = [{"bytes": one, "path": name} for one, name in zip(data, names, strict=True)]
    columns = columns or {"label": range(len(names)), "text": WORDS[: len(names)]}
    table = pa.table({"image": pa.array(images, HUGGING_FACE_IMAGE), **columns})
    features = {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}
    write_as_datasets(path, table, features, row_group_size=2)


def test_parquet_of_hugging_face(folder: Path, store: Store) -> None:
    names: list[str | None] = [f"{number}.jpg" for number in range(6)]
    write_hugging_face(folder / "data" / "train-00000-of-00001.parquet", names, [PHOTO] * 6)
    found = found_in(folder)
    source = check(found, store, "parquet_images")
    assert (source["image"], source["captions"], found.shorter_side) == ("image", ["text"], 40)


def test_parquet_of_hugging_face_that_holds_paths_alone(folder: Path, store: Store, tmp_path: Path) -> None:
    """What `to_parquet` writes of a dataset that was loaded from a folder."""
    names = numbered(tmp_path / "elsewhere")
    paths: list[str | None] = [str(tmp_path / "elsewhere" / name) for name in names]
    write_hugging_face(folder / "a.parquet", paths, [None] * 6)
    source = check(found_in(folder), store, "parquet_images")
    assert source["files"] == str(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").rename(tmp_path / "moved")
    error = refused(folder, "hold no pictures, only paths such as .*0.jpg, which are not there")
    assert "embed_table_storage" in error.remedy


def test_parquet_of_hugging_face_with_lists_and_structs(folder: Path, store: Store) -> None:
    """Sequences of captions, of a length or of none; a caption in a list of objects; several pictures in a row."""
    pictures: list[bytes | None] = [PHOTO] * 6
    pairs = pa.array([[words, words] for words in WORDS], pa.list_(pa.string(), 2))
    write_hugging_face(folder / "1" / "train.parquet", [None] * 6, pictures, captions=pairs)
    found = found_in(folder / "1")
    texts = [[text for _, text in said(item)] for item in items_of(found, store)]
    assert (texts, found.pictures) == ([[words, words] for words in WORDS], 6)
    sentences = [[{"raw": words, "tokens": words.split(), "sentid": number}] for number, words in enumerate(WORDS)]
    write_hugging_face(folder / "2" / "train.parquet", [None] * 6, pictures, sentences=sentences)
    assert check(found_in(folder / "2"), store, "parquet_images")["captions"] == ["sentences.raw"]
    several = {"images": pa.array([[{"bytes": PHOTO, "path": None}] * 2] * 6, pa.list_(HUGGING_FACE_IMAGE))}
    pq.write_table(pa.table(several | {"text": WORDS}), folder / "several.parquet")
    source = check(found_in(folder / "several.parquet"), store, "parquet_images")
    assert source["image"] == "images.0"


def test_parquet_of_hugging_face_in_several_shards(folder: Path, store: Store) -> None:
    for part in range(3):
        name = f"train-{part:05d}-of-00003.parquet"
        write_hugging_face(folder / "data" / name, [None] * 2, [PHOTO] * 2, text=WORDS[2 * part : 2 * part + 2])
    source = check(found_in(folder), store, "parquet_images")
    assert source["tables"] == ["data/*.parquet"]


def test_a_damaged_page_hides_no_table(folder: Path) -> None:
    write_urls(folder, "parquet")
    table = pq.read_table(folder / "t.parquet")
    pq.write_table(pa.concat_tables([table] * 100), folder / "t.parquet", row_group_size=100)
    first = pq.read_metadata(folder / "t.parquet").row_group(0).column(2)
    data = bytearray((folder / "t.parquet").read_bytes())
    begin = first.dictionary_page_offset or first.data_page_offset
    data[begin : begin + first.total_compressed_size] = bytes(first.total_compressed_size)
    (folder / "t.parquet").write_bytes(data)
    found = found_in(folder)
    assert (found.sources[0]["image"], found.pictures) == ("picture", 600)


def test_parquet_with_plain_bytes_and_several_texts(folder: Path, store: Store) -> None:
    columns = {"jpg": [PHOTO] * 6, "title": ["x"] * 6, "caption_long": WORDS, "url": ["https://host.example/1"] * 6}
    pq.write_table(pa.table(columns), folder / "a.parquet")
    found = found_in(folder)
    assert (found.sources[0]["image"], found.sources[0]["captions"]) == ("jpg", ["title", "caption_long"])
    chosen = found_in(folder, captions=("caption_long",))
    check(chosen, store, "parquet_images")


def test_columns_that_say_nothing_are_told_with_the_way_out(folder: Path) -> None:
    pq.write_table(pa.table({"image": [PHOTO] * 3, "label": [1, 2, 3], "md5": ["0" * 32] * 3}), folder / "a.parquet")
    error = refused(folder, r"no column of a.parquet looks like captions \(its columns: label, md5\)")
    assert error.remedy == "name it: --captions COLUMN"
    refused(folder, "a.parquet has no column `md6`", SettingsError, captions=("md6",))


def test_arrow_files_are_none(folder: Path) -> None:
    for name in ("data-00000-of-00001.arrow", "dataset_info.json", "state.json"):
        (folder / name).write_bytes(b"x")
    error = refused(folder, "holds nothing that can be prepared")
    assert "write it with `to_parquet`" in error.remedy


# Tars


def tar_of(members: dict[str, bytes]) -> bytes:
    return tar_bytes(*(member(name, data) for name, data in members.items()))


@pytest.mark.parametrize("beside", ["txt", "json"])
def test_tars_of_pictures_with_words_beside_them(folder: Path, store: Store, beside: str) -> None:
    for part in range(2):
        members: dict[str, bytes] = {}
        for number in range(3 * part, 3 * part + 3):
            words = WORDS[number] if beside == "txt" else json.dumps({"prompt": WORDS[number], "uid": "a7", "width": 9})
            members |= {f"{number}.jpg": PHOTO, f"{number}.{beside}": words.encode(), f"{number}.cls": b"3"}
        (folder / f"{part}.tar").write_bytes(tar_of(members))
    source = check(found_in(folder), store, "webdataset")
    assert source["captions"] == [{"txt": "txt", "json": "json.prompt"}[beside]]
    assert source["tars"] == ["*.tar"]
    assert found_in(folder / "1.tar").sources[0]["tars"] == ["1.tar"]


def test_tars_without_words_or_pictures_are_told_of(folder: Path) -> None:
    (folder / "a.tar").write_bytes(tar_of({"1.jpg": PHOTO, "1.cls": b"3"}))
    refused(folder, r"nothing beside the pictures of a.tar looks like captions \(no .txt, .*no .json is there\)")
    (folder / "a.tar").write_bytes(tar_of({"1.jpg": PHOTO, "1.json": b'{"uid": "a7", "width": 9}'}))
    refused(folder, r"looks like captions \(beside them: json.uid, json.width\)")
    (folder / "a.tar").write_bytes(tar_of({"1.txt": b"words"}))
    refused(folder, "a.tar holds no pictures")


@pytest.mark.parametrize("ending", ["tar.gz", "tgz", "tar.bz2", "tar.zst"])
def test_packed_tars_are_unpacked_into_the_store(folder: Path, store: Store, ending: str) -> None:
    members: dict[str, bytes] = {}
    for number, words in enumerate(WORDS):
        members |= {f"{number}.jpg": PHOTO, f"{number}.txt": words.encode()}
    pack = PACKERS[".gz" if ending == "tgz" else f".{ending.rpartition('.')[2]}"]
    (folder / f"a.{ending}").write_bytes(pack(tar_of(members)))
    source = check(found_in(folder), store, "webdataset")
    assert (source["tars"], source["unpack"]) == ([f"a.{ending}"], True)


def test_of_a_large_packed_tar_the_beginning_is_looked_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members: dict[str, bytes] = {}
    for number in range(500):
        members |= {f"{number}.jpg": PHOTO + os.urandom(2000), f"{number}.txt": b"words of some picture"}
    (folder / "a.tar.gz").write_bytes(PACKERS[".gz"](tar_of(members)))
    monkeypatch.setattr("data_prep.survey.tars._UNPACKED", 300_000)
    found = found_in(folder)
    assert found.pictures == pytest.approx(500, rel=0.2) and not found.counted


def test_what_is_called_a_tar_and_is_none_is_told_of(folder: Path) -> None:
    with zipfile.ZipFile(folder / "a.tar", "w") as made:
        made.writestr("1.jpg", PHOTO)
    refused(folder, r"a.tar cannot be read \(unknown_format: a ZIP archive: unpack it into a folder\)")


def test_mosaics_shards_are_refused_with_the_way_out(folder: Path) -> None:
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": [{"format": "mds"}]}))
    (folder / "shard.00000.mds").write_bytes(bytes(100))
    (folder / "shard.00001.mds.zstd").write_bytes(bytes(100))
    error = refused(folder, "holds nothing that can be prepared")
    assert "streaming.StreamingDataset" in error.remedy and "webdataset.ShardWriter" in error.remedy


# All of them


def test_several_corpora_at_one_place_are_asked_about(folder: Path, store: Store) -> None:
    for name, words in zip(numbered(folder), WORDS, strict=True):
        (folder / name).with_suffix(".txt").write_text(words)
    (folder / "a.tar").write_bytes(tar_of({"1.jpg": PHOTO, "1.txt": b"words of a tar"}))
    error = refused(folder, r"holds several corpora \(webdataset: a.tar; text_folder: 6 pictures\)", SettingsError)
    assert "--kind webdataset or --kind text_folder" in error.remedy
    check(found_in(folder, kind="text_folder"), store, "text_folder")
    check(found_in(folder, kind="webdataset"), store, "webdataset", ["words of a tar"])
    refused(folder, "is no url_list", kind="url_list")
    refused(folder, "`folder` is no kind of corpus", SettingsError, kind="folder")


@pytest.mark.parametrize(("there", "says"), [(False, "there is no "), (True, "is empty")])
def test_nothing_is_told_of(folder: Path, there: bool, says: str) -> None:
    refused(folder if there else folder / "nowhere", says, DataError if there else SettingsError)


def test_a_large_corpus_is_looked_at_in_part(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbered(folder)
    for name in numbered(folder):
        (folder / name).with_suffix(".txt").write_text("words")
    monkeypatch.setattr(place, "MOST_NAMES", 8)
    found = found_in(folder)
    assert (found.pictures, found.counted) == (4, False)


def test_of_many_tables_a_first_run_takes_as_many_as_it_needs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        write_hugging_face(folder / "data" / f"{number}.parquet", [None] * 6, [PHOTO] * 6)
    monkeypatch.setattr("data_prep.survey.candidates.ENOUGH", 10)
    found = found_in(folder)
    assert found.sources[0]["tables"] == ["data/0.parquet", "data/1.parquet"]
    assert found.remarks[0]["tables"] == "2 of 5, enough for a first model; all of them: ['data/*.parquet']"
    assert (found.pictures, found.counted) == (12, False)


def test_a_long_table_is_not_read_to_its_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "http://host.example/{}.jpg,a photo of something\n"
    (folder / "t.csv").write_text("url,caption\n" + "".join(line.format(number) for number in range(20_000)))
    monkeypatch.setattr("data_prep.survey.tables.ROWS", 50)
    found = found_in(folder)
    assert not found.counted
    assert found.pictures == pytest.approx(20_000, rel=0.3)


def test_names_are_of_letters_that_names_may_have(tmp_path: Path) -> None:
    assert name_of("/data/My photos (2024)/") == "My-photos-2024"
    assert name_of("s3://bucket/some/prefix.v2") == "prefix"
    assert name_of("/") == "mine"
