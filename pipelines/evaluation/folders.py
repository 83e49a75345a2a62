"""Pictures in folders as GenEval's scripts lay them out: other models' to be judged, and ours to be judged elsewhere.

    00000/metadata.jsonl        the prompt as a line of GenEval's file
    00000/samples/0000.png      its pictures
    results.jsonl               our verdicts, as GenEval's script for scores reads them

Folders are numbered as the prompts are, and files as the prompt's pictures. Other files, such as `grid.png`, are left
alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from infra import layout
from infra.errors import EvaluationError
from infra.files import appearing
from infra.records import EvalReport
from infra.store import Store
from pipelines.evaluation import detections
from pipelines.evaluation import geneval as protocol
from pipelines.evaluation.chunks import Chunk, Shelf
from pipelines.evaluation.detections import Kept
from pipelines.evaluation.generate import DrawingSettings, chunked
from pipelines.evaluation.geneval import Verdict
from pipelines.evaluation.judging import verdict_rows
from pipelines.evaluation.prompts import Prompt
from pipelines.evaluation.tars import packed, place, read_pictures

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_METADATA = "metadata.jsonl"
_RESULTS = "results.jsonl"


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


def _named(folder: Path, number: int, image: int, suffix: str = ".png") -> Path:
    return _samples(folder, number) / f"{image:04d}{suffix}"


def _file(folder: Path, number: int, image: int) -> Path | None:
    files = (_named(folder, number, image, suffix) for suffix in _SUFFIXES)
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
    """Write a report's pictures and verdicts to a folder, one tar after the other; returns how many pictures."""
    count = 0
    for number, prompt in enumerate(prompts):
        _samples(folder, number).mkdir(parents=True, exist_ok=True)
        with appearing(folder / f"{number:05d}" / _METADATA) as path:
            path.write_text(json.dumps(prompt.metadata()) + "\n", encoding="utf-8")
    for tar in report.pictures:
        for (number, image), data in read_pictures(store, [tar]).items():
            with appearing(_named(folder, number, image, _suffix(data))) as path:
                path.write_bytes(data)
            count += 1
    with appearing(folder / _RESULTS) as path, path.open("w", encoding="utf-8") as file:
        for result in results(store, report, prompts, folder):
            file.write(json.dumps(result) + "\n")
    return count


def results(store: Store, report: EvalReport, prompts: Sequence[Prompt], folder: Path) -> Iterator[dict[str, object]]:
    """The verdicts as lines of GenEval's `results.jsonl`, one table of what the judge saw after the other."""
    causes = {(row["prompt"], row["image"]): row for row in verdict_rows(store, report.details)}
    seen = set[tuple[int, int]]()
    for table in report.detections:
        for (number, image), kept in detections.of_table(store, table).items():
            seen.add((number, image))
            judged = detections.verdict(prompts[number], number, image, kept)
            yield _result(folder, prompts[number], judged, _details(prompts[number], kept))
    for (number, image), row in causes.items():
        if (number, image) not in seen:  # there was no picture, or it was judged before detections were kept
            prompt = prompts[number]
            reasons = (row["reasons"],) if row["reasons"] else ()
            yield _result(folder, prompt, Verdict(prompt.tag, number, prompt.prompt, image, reasons), {})


def _result(folder: Path, prompt: Prompt, verdict: Verdict, details: Mapping[str, object]) -> dict[str, object]:
    return {
        "filename": str(_file(folder, verdict.number, verdict.image) or _named(folder, verdict.number, verdict.image)),
        "tag": verdict.task,
        "prompt": verdict.prompt,
        "correct": verdict.correct,
        "reason": "\n".join(verdict.reasons),
        "metadata": json.dumps(prompt.metadata()),
        "details": json.dumps(details),
    }


def _details(prompt: Prompt, kept: Sequence[Kept]) -> dict[str, list[list[float]]]:
    """Class -> the boxes that counted, each with its score."""
    counted = protocol.counted(prompt, [detection for detection, _ in kept])
    return {label: [[*found.box, found.score] for found in objects] for label, objects in counted.items()}


def _suffix(data: bytes) -> str:
    if data.startswith(b"\xff\xd8"):
        return ".jpg"
    return ".webp" if data[8:12] == b"WEBP" else ".png"
