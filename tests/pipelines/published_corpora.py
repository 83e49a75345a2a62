"""Some pictures of the shape world, laid out as the corpora of the published recipes are when they are downloaded."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.shapes.world import captions, render, sample_scene
from tests.data_prep import zoo
from tests.data_prep.web import Page

SIZE = 64
CLASSES = ("n01440764", "n01443537", "n01484850")
QUESTIONS = """item_id,text,proposition_id,dependency,tuple,question_natural_language
0,A red circle.,1,0,entity - whole (circle),Is there a circle?
"""
COUNT = 24  # of each corpus; two fifths of it for those that are for fine-tuning


class Pictured(NamedTuple):
    jpeg: bytes
    caption: str


def pictures(corpus: str, count: int) -> Iterator[Pictured]:
    for number in range(count):
        rng = random.Random(f"{corpus}/{number}")
        scene = sample_scene(rng)
        yield Pictured(zoo.saved(render(scene, SIZE), "JPEG"), captions(scene, rng).medium)


def sa_1b(folder: Path) -> None:
    for first in (0, COUNT // 2):
        members: dict[str, bytes] = {}
        for number, (jpeg, _) in enumerate(pictures(f"sa-1b/{first}", COUNT // 2), start=first + 1):
            masks = {"image": {"image_id": number}, "annotations": [{"id": 1, "segmentation": {}}]}
            members |= {f"./sa_{number}.jpg": jpeg, f"./sa_{number}.json": json.dumps(masks).encode()}
        _tar(folder / f"sa_{first:06d}.tar", members)


def journeydb(folder: Path) -> None:
    named = {f"000/{number:08x}-db.jpg": jpeg for number, (jpeg, _) in enumerate(pictures("journeydb", COUNT))}
    _tar(folder / "data/train/imgs/000.tgz", named)


def imagenet(folder: Path) -> None:
    for number, (jpeg, _) in enumerate(pictures("imagenet", 3 * COUNT)):
        path = folder / "train" / CLASSES[number % 3] / f"{CLASSES[number % 3]}_{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg)


def cc12m(folder: Path, web: str = "http://127.0.0.1:1/") -> dict[str, Page]:
    """The list; what its addresses answer, all but one, is returned."""
    pages: dict[str, Page] = {}
    rows = []
    for number, (jpeg, caption) in enumerate(pictures("cc12m", 2 * COUNT)):
        pages[f"/{number}.jpg"] = jpeg
        said = {"caption_llava": caption, "caption_llava_short": caption.split(",")[0], "status": "success"}
        rows.append({"url": f"{web}{number}.jpg", "key": f"{number:09d}", **said})
    rows.append(rows[0] | {"url": f"{web}gone.jpg"})
    folder.mkdir(parents=True)
    (folder / "train.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return pages


def blip3o_60k(folder: Path) -> None:
    for name in ("geneval_train", "object_1"):
        members: dict[str, bytes] = {}
        for number, (jpeg, caption) in enumerate(pictures(name, COUNT * 2 // 5)):
            members |= {f"{name}_{number}.jpg": jpeg, f"{name}_{number}.txt": caption.encode()}
        _tar(folder / f"{name}.tar", members)


def dalle_3(folder: Path) -> None:
    shown = list(pictures("dalle-3", COUNT * 2 // 5))
    images = [{"bytes": jpeg, "path": f"{number}.png"} for number, (jpeg, _) in enumerate(shown)]
    (folder / "data").mkdir(parents=True)
    table = pa.table({"caption": [caption for _, caption in shown], "image": images})
    pq.write_table(table, folder / "data/train-00000-of-00001.parquet")


def sharegpt_4o(folder: Path) -> None:
    (folder / "image").mkdir(parents=True)
    rows = []
    for number, (jpeg, caption) in enumerate(pictures("sharegpt-4o", COUNT * 2 // 5)):
        (folder / f"image/{number}.png").write_bytes(jpeg)
        rows.append({"input_prompt": caption, "output_image": f"image/{number}.png"})
    (folder / "text_to_image.json").write_text(json.dumps(rows))


def write(folder: Path, web: str = "http://127.0.0.1:1/") -> dict[str, Page]:
    """All of them, under the names that the recipes give them; the pages of the web are returned."""
    sa_1b(folder / "sa-1b")
    journeydb(folder / "journeydb")
    imagenet(folder / "imagenet")
    blip3o_60k(folder / "blip3o-60k")
    dalle_3(folder / "dalle-3")
    sharegpt_4o(folder / "sharegpt-4o")
    (folder / "dpg_bench.csv").write_text(QUESTIONS)
    return cc12m(folder / "cc12m", web)


def _tar(path: Path, members: Mapping[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
