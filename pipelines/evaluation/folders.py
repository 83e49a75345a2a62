"""Pictures in folders as GenEval's scripts lay them out: other models' to be judged, and ours to be judged elsewhere.

    00000/metadata.jsonl        the prompt as a line of GenEval's file
    00000/samples/0000.png      its pictures

Folders are numbered as the prompts are, and files as the prompt's pictures. Other files, such as `grid.png`, are left
alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from infra import layout
from infra.errors import EvaluationError
from infra.files import appearing
from infra.records import EvalReport
from infra.store import Store
from pipelines.evaluation.chunks import Chunk, Shelf
from pipelines.evaluation.generate import DrawingSettings, chunked
from pipelines.evaluation.prompts import Prompt
from pipelines.evaluation.tars import packed, place, read_pictures

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_METADATA = "metadata.jsonl"


def taken(
    store: Store, stage: str, folder: Path, prompts: Sequence[Prompt], images: int, settings: DrawingSettings
) -> list[Chunk]:
    """The pictures of a folder as chunks, as if they had been drawn; a picture that is not there is counted."""
    if not any(file for number in range(len(prompts)) for file in _samples(folder, number).glob("*")):
        raise EvaluationError(
            f"{folder} holds no pictures of these prompts",
            remedy="lay them out as 00000/samples/0000.png: the number of the prompt, then that of its picture",
        )
    for number, prompt in enumerate(prompts):
        _check_prompt(folder / f"{number:05d}" / _METADATA, prompt)
    shelf, chunks = Shelf(store, layout.DRAWN, stage), []
    for first, asked in chunked([prompt.prompt for prompt in prompts], images, settings).items():
        pictures, missing = dict[str, bytes](), dict[str, str]()
        for name in asked.pictures(images):
            file = _file(folder, *place(name))
            if file is None:
                missing[name] = "it is not in the folder"
            else:
                pictures[f"{name}{file.suffix.lower()}"] = file.read_bytes()
        chunks.append(shelf.put(first, packed(pictures, missing), "a folder"))
    return chunks


def _samples(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}" / "samples"


def _file(folder: Path, number: int, image: int) -> Path | None:
    files = (_samples(folder, number) / f"{image:04d}{suffix}" for suffix in _SUFFIXES)
    return next((file for file in files if file.is_file()), None)


def _check_prompt(path: Path, prompt: Prompt) -> None:
    """Where a folder tells its prompt, it must be the one that its pictures are judged by."""
    if not path.is_file():
        return
    try:
        told = json.loads(path.read_text(encoding="utf-8"))["prompt"]
    except (OSError, ValueError, KeyError, TypeError):
        told = None
    if told != prompt.prompt:
        raise EvaluationError(
            f"{path} is of the prompt {str(told)[:80]!r}, and not of {prompt.prompt[:80]!r}",
            remedy="name the prompts that the pictures were drawn for: --set prompts=FILE",
        )


def laid_out(store: Store, report: EvalReport, prompts: Sequence[Prompt], folder: Path) -> int:
    """Write a report's pictures to a folder, one tar after the other; returns how many."""
    count = 0
    for number, prompt in enumerate(prompts):
        _samples(folder, number).mkdir(parents=True, exist_ok=True)
        with appearing(folder / f"{number:05d}" / _METADATA) as path:
            path.write_text(json.dumps(prompt.metadata()) + "\n", encoding="utf-8")
    for tar in report.pictures:
        for (number, image), data in read_pictures(store, [tar]).items():
            with appearing(_samples(folder, number) / f"{image:04d}{_suffix(data)}") as path:
                path.write_bytes(data)
            count += 1
    return count


def _suffix(data: bytes) -> str:
    if data.startswith(b"\xff\xd8"):
        return ".jpg"
    return ".webp" if data[8:12] == b"WEBP" else ".png"
