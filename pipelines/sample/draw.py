"""`pixnerd sample`: pictures of prompts or classes in a folder, with a contact sheet and an index.

Each PNG carries all that decided its pixels. So a second call draws only the pictures that are missing, and a folder
with pictures of a different call is refused and never overwritten.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from infra.config import digest
from infra.errors import DataError, SettingsError
from infra.files import sha256_of
from infra.text import cut
from pipelines.pictures import sheet
from pipelines.sample.files import facts_of, save, version, written_whole
from pipelines.sample.prompts import Subject, parse_seeds, read_labels, subjects
from training import model as models
from training.model import ModelConfig
from training.sampling import Artist, SampleSettings, check_finite, defaults, encoder_source, pixels, resolved

INDEX, SHEET = "index.json", "sheet.png"
_PICTURE = re.compile(r"\d{3,}-\d+\.png")
_SHEET = re.compile(r"sheet(-\d+)?\.png")
_FAST = 1  # PNG compression of frames, as there are many: one for each step of each picture

Show = Callable[[str, float, int], None]  # a text, how much is done, of how much


class Picture(NamedTuple):
    file: str
    subject: Subject
    seed: int
    facts: dict[str, Any]  # all that decides its pixels

    @property
    def condition(self) -> str | int:
        """The prompt or the label that is drawn."""
        return self.subject.prompt if self.subject.label is None else self.subject.label

    def frame(self, step: int, steps: int) -> Path:
        return Path(Path(self.file).stem) / f"step-{step:0{len(str(steps))}d}.png"


class DrawResult(NamedTuple):
    index_json: dict[str, Any]  # the content of the folder's index
    pictures: int
    new: int  # pictures that did not exist before
    size: tuple[int, int]
    device: str
    seconds: float


def draw(
    checkpoint: Path,
    out: Path,
    prompts: Sequence[str],
    *,
    prompts_file: Path | None,
    labels_file: Path | None,
    seeds: str,
    options: Mapping[str, Any],
    device: str,
    save_steps: bool,
    show: Show,
) -> DrawResult:
    """`options` are the sampling settings that the command line gives, as text."""
    seed_numbers, changes = parse_seeds(seeds), _changes(options)
    config, extra = models.read_config(checkpoint)
    if config.task == "text" and labels_file is not None:
        raise SettingsError(f"{checkpoint} draws from prompts, not from labels", remedy="leave --labels out")
    labels = read_labels(checkpoint, config.classes, extra, labels_file) if config.task == "class" else None
    wanted = subjects(prompts, prompts_file, seed_numbers, labels)
    settings = resolved(checkpoint, defaults(checkpoint, changes))
    place = find_device(device)
    pictures = _pictures(wanted, settings, _origin(checkpoint, config, extra))
    assumed = _assumed_size(checkpoint, config, settings)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(
            f"{out} cannot be written ({error.strerror or error})", remedy="name another --out"
        ) from None
    _refuse_others(out, pictures)
    todo = {p.file for p in pictures if not _is_drawn(out, p, settings.steps if save_steps else 0)}
    began = time.monotonic()
    if todo:
        show("loading", 0, len(todo))
        artist = Artist.load(checkpoint, place, settings)
        _warn_of_long_prompts(artist, [p for p in pictures if p.file in todo])
        _draw(artist, out, pictures, todo, settings, save_steps, show)
    seconds = time.monotonic() - began
    index = _conclude(out, wanted, pictures, settings, save_steps, assumed)
    assert settings.size is not None
    return DrawResult(index, len(pictures), len(todo), settings.size, place, seconds)


# ------------------------------------------------------------------------------------------------ what is asked for


def _changes(options: Mapping[str, Any]) -> dict[str, Any]:
    parsers: dict[str, Callable[[str], Any]] = {"size": parse_size, "interval": parse_interval}
    return {name: parsers[name](value) if name in parsers else value for name, value in options.items()}


def parse_size(text: str) -> tuple[int, int]:
    """Height and width: 512 is (512, 512), 768x1024 is (768, 1024)."""
    sides = text.lower().replace("×", "x").split("x")
    if len(sides) > 2 or not all(re.fullmatch(r"0{0,9}[1-9]\d{0,5}", side, re.ASCII) for side in sides):
        raise SettingsError(f"`{cut(text)}` is no size", remedy="write 512, or 768x1024: height, then width")
    return int(sides[0]), int(sides[-1])


def parse_interval(text: str) -> tuple[float, float]:
    """Two times: 0.1,1 is (0.1, 1.0)."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise SettingsError(
            f"`{text}` is no interval", remedy="write two times between 0 and 1, such as 0.1,1"
        ) from None
    return low, high


def find_device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", name, re.ASCII):
        raise SettingsError(f"there is no device `{name}`", remedy="name auto, cpu, cuda, or one GPU: cuda:1")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if gpus else "cpu"
    if name != "cpu" and int(name.partition(":")[2] or 0) >= gpus:
        usable = ", ".join(f"cuda:{number}" for number in range(gpus)) or "no GPU that PyTorch can use"
        raise SettingsError(f"the device {name} is not there: this machine has {usable}", remedy="use --device auto")
    return name


def _pictures(wanted: Sequence[Subject], settings: SampleSettings, origin: dict[str, Any]) -> list[Picture]:
    """All pictures asked for; those of one prompt follow each other, so that its text is encoded once."""
    made_with = {"settings": settings.results(), "checkpoint": origin, "pixnerd": version()}
    pictures = []
    for number, subject in enumerate(wanted):
        condition = {"prompt": subject.prompt} | ({} if subject.label is None else {"label": subject.label})
        for seed in subject.seeds:
            # Through JSON and back, so that they compare equal to facts that are read from a file.
            facts = json.loads(json.dumps({**condition, "seed": seed, **made_with}))
            pictures.append(Picture(f"{number:03d}-{seed}.png", subject, seed, facts))
    return pictures


def _assumed_size(folder: Path, config: ModelConfig, settings: SampleSettings) -> int | None:
    """The size to take for the trained one where the checkpoint does not tell it: the size asked for; else None."""
    assert settings.size is not None
    side = settings.size[0] if config.image_size is None else None
    if side is not None:
        print(
            f"warning: the size that {folder} was trained at is not known: it is taken to be {side}x{side}; if it was "
            "another, import it again with --trained-size N",
            file=sys.stderr,
        )
    return side


def _origin(folder: Path, config: ModelConfig, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint by its content, as its place may change; its name is only for people to read."""
    origin = {"name": folder.resolve().name, "model": digest(config)}
    if config.task == "text":
        source = encoder_source(folder, extra)
        origin["text_encoder"] = _content_digest(Path(source)) if Path(source).is_dir() else str(source)
    return origin | {"weights": sha256_of(folder / models.WEIGHTS)}


def _content_digest(folder: Path) -> str:
    """A digest of all files but hidden ones, in which download tools keep dates."""
    files = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    visible = {name: path for name, path in files.items() if not any(part.startswith(".") for part in name.parts)}
    return digest({name.as_posix(): sha256_of(path) for name, path in visible.items()})


# ------------------------------------------------------------------------------------------------ existing files


def _refuse_others(out: Path, pictures: Sequence[Picture]) -> None:
    """Refuse a folder in which a file has a name that this command gives, but is of another call or program."""
    wanted = {picture.file: picture.facts for picture in pictures}
    for path in [*sorted(out.glob("*.png")), *sorted(out.glob("*/step-*.png"))]:
        name = path.name if path.parent == out else f"{path.parent.name}.png"  # a frame counts as its picture
        if not _PICTURE.fullmatch(name) and not _SHEET.fullmatch(name):
            continue
        facts = facts_of(path)
        if facts is None:
            raise _other_call(out, f"{path.relative_to(out)} is not from this command")
        if _PICTURE.fullmatch(name):
            if name not in wanted:
                raise _other_call(out, f"it holds {path.relative_to(out)}, which this one does not draw")
            if difference := _difference(facts, wanted[name]):
                raise _other_call(out, f"{path.relative_to(out)} has {difference}")
    if (out / INDEX).exists() and not _is_index(out / INDEX):
        raise _other_call(out, f"{INDEX} is not from this command")


def _other_call(out: Path, why: str) -> SettingsError:
    return SettingsError(f"{out} holds the pictures of another call: {why}", remedy="name another --out, or clear it")


def _difference(facts: Mapping[str, Any], wanted: Mapping[str, Any], path: str = "") -> str:
    """The first wanted fact that a file has otherwise, but for the checkpoint's name, which decides no pixel.

    For instance `settings.steps 20, not 25`; empty if there is none. A file may hold more facts.
    """
    for key, value in wanted.items():
        if f"{path}{key}" == "checkpoint.name":
            continue
        other = facts.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            if inner := _difference(other, value, f"{path}{key}."):
                return inner
        elif other != value:
            return f"{path}{key} {json.dumps(other)}, not {json.dumps(value)}"
    return ""


def _is_index(path: Path) -> bool:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(data, dict) and {"pixnerd", "pictures"} <= data.keys()


def _is_drawn(out: Path, picture: Picture, frames: int) -> bool:
    """Whether the picture and its frames exist. It is written after them, but perhaps by a call that kept no frames."""
    files = [Path(picture.file), *(picture.frame(step, frames) for step in range(1, frames + 1))]
    return all((out / file).exists() for file in files)


# ------------------------------------------------------------------------------------------------ drawing


def _warn_of_long_prompts(artist: Artist, todo: Sequence[Picture]) -> None:
    if artist.text is None:
        return
    too_long = artist.too_long(list(dict.fromkeys(picture.subject.prompt for picture in todo)))
    if too_long:
        prompt, tokens = max(too_long.items(), key=lambda item: item[1])
        who = "a prompt is" if len(too_long) == 1 else f"{len(too_long)} prompts are"
        print(
            f"warning: {who} cut after {artist.text.tokens} tokens, all that the network reads; "
            f"{'it' if len(too_long) == 1 else 'the longest'} has {tokens}: {cut(prompt)}",
            file=sys.stderr,
        )


def _draw(
    artist: Artist,
    out: Path,
    pictures: Sequence[Picture],
    todo: Collection[str],
    settings: SampleSettings,
    save_steps: bool,
    show: Show,
) -> None:
    """Draw the batches with pictures that are missing, whole: in a smaller batch one could differ by a grey level."""
    device = artist.device
    machine = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
    }
    batches = [pictures[start : start + settings.batch] for start in range(0, len(pictures), settings.batch)]
    artist.expect([[p.condition for p in batch] for batch in batches])
    batches = [batch for batch in batches if any(p.file in todo for p in batch)]
    done, total = 0, sum(map(len, batches))
    if settings.compile:
        show("compiling", 0, total)
    for batch in batches:
        on_step = _step_observer(out, batch, todo if save_steps else (), done, total, settings.steps, show)
        drawn = artist.batch([p.condition for p in batch], [p.seed for p in batch], settings, on_step)
        for picture, picture_HW3 in zip(batch, drawn, strict=True):
            if picture.file in todo:
                facts = {**picture.facts, "machine": machine}
                save(out / picture.file, Image.fromarray(picture_HW3), picture.subject.prompt, facts)
        done += len(batch)


def _step_observer(
    out: Path, batch: Sequence[Picture], framed: Collection[str], start: int, total: int, steps: int, show: Show
) -> Callable[[int, Tensor], None]:
    """Called at each sampling step: shows how far the batch is, and writes the step's frames of the files `framed`."""
    which = f"{start + 1}-{start + len(batch)}" if len(batch) > 1 else f"{start + 1}"

    def on_step(step: int, x_BCHW: Tensor) -> None:
        if framed:
            check_finite(x_BCHW, [p.condition for p in batch], [p.seed for p in batch])
            for picture, frame_HW3 in zip(batch, pixels(x_BCHW), strict=True):
                if picture.file in framed:
                    facts = {**picture.facts, "step": step}
                    path = out / picture.frame(step, steps)
                    save(path, Image.fromarray(frame_HW3), picture.subject.prompt, facts, level=_FAST)
        show(f"drawing {which} of {total}, step {step} of {steps}", start + len(batch) * step / steps, total)

    return on_step


# ------------------------------------------------------------------------------------------------ sheet and index


def _conclude(
    out: Path,
    wanted: Sequence[Subject],
    pictures: Sequence[Picture],
    settings: SampleSettings,
    save_steps: bool,
    assumed: int | None,
) -> dict[str, Any]:
    """Write the sheets and the index from the files in the folder, so that earlier calls' pictures are in them."""
    entries = []
    for picture in pictures:
        facts = {k: v for k, v in (facts_of(out / picture.file) or {}).items() if k not in ("checkpoint", "pixnerd")}
        entry = {"file": picture.file, **facts, **_measured(out / picture.file)}
        entries.append(entry | ({"steps": Path(picture.file).stem} if save_steps else {}))
    origin = pictures[0].facts["checkpoint"]
    if assumed is not None:
        origin = {**origin, "assumed_trained_size": assumed}
    names = _write_sheets(out, wanted, pictures, settings, origin["name"])
    index = {"pixnerd": version(), "checkpoint": origin, "sheets": names, "pictures": entries}
    with written_whole(out / INDEX) as unfinished:
        unfinished.write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return index


def _measured(path: Path) -> dict[str, Any]:
    """Size, and the sha256 of the pixels: rows from the top, of each pixel 8 bits of red, green and blue."""
    try:
        with Image.open(path) as image:
            pixels_sha256 = hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()
            return {"height": image.height, "width": image.width, "pixels_sha256": pixels_sha256}
    except (OSError, SyntaxError) as error:
        raise DataError(f"{path} is damaged ({error})", remedy="delete it, and draw again") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"{path} is too large to be read ({error})", remedy="delete it, and draw it smaller") from None


def _write_sheets(
    out: Path, wanted: Sequence[Subject], pictures: Sequence[Picture], settings: SampleSettings, name: str
) -> list[str]:
    by_subject: dict[Subject, list[Picture]] = {subject: [] for subject in wanted}
    for picture in pictures:
        by_subject[picture.subject].append(picture)
    rows = [
        sheet.Row(_caption(subject), [out / p.file for p in drawn], [f"seed {p.seed}" for p in drawn])
        for subject, drawn in by_subject.items()
    ]
    assert settings.size is not None
    names: list[str] = []
    for image in sheet.sheets(name, _about(settings), rows, sheet.Layout.of(rows, settings.size)):
        names.append(f"sheet-{len(names) + 1}.png" if names else SHEET)
        save(out / names[-1], image, f"contact sheet of {name}", {"sheet": len(names)})
    for path in out.glob("sheet-*.png"):  # left by an earlier call that needed more sheets
        if _SHEET.fullmatch(path.name) and path.name not in names:
            path.unlink()
    return names


def _caption(subject: Subject) -> str:
    if subject.label is None:
        return subject.prompt or "(no prompt)"
    if not subject.prompt:
        return "(no class)"
    return f"class {subject.label}" + (f": {subject.prompt}" if subject.prompt != str(subject.label) else "")


def _about(settings: SampleSettings) -> str:
    assert settings.size is not None
    low, high = settings.interval
    return (
        f"{settings.solver}, {settings.steps} steps · guidance {settings.guidance:g} on ({low:g}, {high:g}) · "
        f"shift {settings.shift:g} · {settings.size[0]}x{settings.size[1]} (height x width) · {settings.precision} · "
        f"pixnerd {version()}"
    )
