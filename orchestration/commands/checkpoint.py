"""`pixnerd checkpoint`: show, import, export and fetch checkpoints, and average their weights otherwise."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from infra.errors import SettingsError
from orchestration import terminal
from orchestration.options import JsonOption
from orchestration.patience import doing
from orchestration.terminal import print_json

if TYPE_CHECKING:
    from infra.records import AveragesRecord, Profile
    from training.model.fit import Shape
    from training.model.presets import ModelConfig

app = typer.Typer(no_args_is_help=True, help="Show, import, export and fetch checkpoints.", rich_markup_mode=None)

# The part of the network that a tensor belongs to, by the first prefix of its name that fits.
_PARTS = {
    "stem.": "stem",
    "time.": "time embedding",
    "text.blocks.": "text-refine blocks",
    "text.": "text projection",
    "label.": "label embedding",
    "trunk.": "trunk",
    "field.": "field",
    "head.": "linear head",
}
_WHICH = "Name of the train stage, or the key of a record that a training has written: it need not have ended."
_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names


@app.command("show", epilog="Example: pixnerd checkpoint show champion")
def show(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint's folder, or a published checkpoint's file.")],
    json_: JsonOption = False,
) -> None:
    """Show a checkpoint's task, sizes, parameters by part, and origin; the weights are not read."""
    from training import model as models
    from training.model.published import exchange

    doing(f"reading {checkpoint}")
    if checkpoint.is_file():
        _show_file(checkpoint, as_json=json_)
        return
    config, extra = models.read_config(checkpoint)
    stored = models.read_header(checkpoint, config)
    head_path = checkpoint / models.HEAD
    head = models.header(head_path) if head_path.exists() else {}
    facts = {
        **_facts(config, {name: tensor.shape for name, tensor in stored.items()}),
        "repa_head": _count(tensor.shape for tensor in head.values()),
        "dtypes": Counter(_TYPES.get(tensor.dtype, tensor.dtype) for tensor in stored.values()),
        "extra": extra,
    }
    if json_:
        print_json(facts)
        return
    _print_facts(config, facts)
    if config.task == "text":
        encoder = extra.get("text_encoder", "not said: import again with --text-encoder")
        print(f"text encoder: {'its own, in the folder text' if encoder == 'text' else encoder}")
    if origin := exchange.provenance(extra):
        print("provenance:")
        for name, value in origin.items():
            print(f"  {name.replace('_', ' ')}: {_text(value)}")


def _show_file(path: Path, *, as_json: bool) -> None:
    from training import model as models
    from training.model.fit import plain
    from training.model.published.file import read

    published = read(path)
    configs = {name: published.config(name) for name in published.networks}
    networks = {
        name: {
            **_facts(config, {n: tuple(t.shape) for n, t in models.outline(config).state_dict().items()}),
            "repa_head": _count(tuple(tensor.shape) for tensor in published.head.values()),
            "dtypes": Counter(plain(tensor.dtype) for tensor in published.networks[name].values()),
        }
        for name, config in configs.items()
    }
    if as_json:
        print_json({"networks": networks, "skipped": published.skipped})
        return
    held = f"the network{'s' if len(published.networks) > 1 else ''} {' and '.join(published.networks)}"
    print(f"{path.name}: a file of the published layout; it holds {held}")
    for prefix, count in published.skipped.items():
        print(f"not imported: {count} tensors of {prefix}")
    for name, facts in networks.items():
        print(f"\n{name}:")
        _print_facts(configs[name], facts)


def _facts(config: ModelConfig, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    parts: Counter[str] = Counter()
    for name, shape in shapes.items():
        parts[next(part for prefix, part in _PARTS.items() if name.startswith(prefix))] += _count([shape])
    ordered = {part: parts[part] for part in _PARTS.values() if part in parts}
    return {"preset": preset_of(config), "settings": config.model_dump(mode="json"), "parameters": ordered}


def _count(shapes: Iterable[Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def preset_of(config: ModelConfig) -> str | None:
    """The preset with these sizes. Image size and grid are not compared: they are chosen at each use."""
    from training.model.presets import PRESETS

    ignored = {"image_size": None, "fixed_grid": False}
    wanted = config.model_copy(update=ignored)
    return next((name for name, known in PRESETS.items() if known.model_copy(update=ignored) == wanted), None)


def _print_facts(config: ModelConfig, facts: Mapping[str, Any]) -> None:
    named = f" ({facts['preset']})" if facts["preset"] else ""
    print(f"PixNerd, {config.task} to image{named}")
    print(f"trunk: {config.blocks} blocks of width {config.hidden} with {config.heads} heads")
    if config.task == "text":
        print(
            f"text: {config.text_blocks} refine blocks over at most {config.text_tokens} tokens of {config.text_dim} "
            f"features, pads {'seen like words' if config.text_padding == 'published' else 'masked'}"
        )
    else:
        print(f"labels: {config.classes} classes")
    size = config.patch_size
    if config.field_blocks:
        print(
            f"patches of {size} x {size} pixels, each a field of {config.field_blocks} blocks of "
            f"{config.field_channels} channels, ratio {config.field_ratio}; code {config.coordinate_code}, "
            f"norms {config.field_norm}"
        )
    else:
        print(f"patches of {size} x {size} pixels, drawn by a linear head")
    side = config.image_size
    print(f"trained size: {f'{side} x {side}' if side else 'not known: import again with --trained-size'}")
    parts = facts["parameters"]
    rows = [[part, f"{count:,}"] for part, count in [*parts.items(), ("in all", sum(parts.values()))]]
    if facts["repa_head"]:
        rows.append(["beside it, the REPA head", f"{facts['repa_head']:,}"])
    terminal.table(["part", "parameters"], rows)
    print(f"types: {_text(facts['dtypes'])}")


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{count} tensors of {name}" for name, count in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "nothing"
    return str(value)


@app.command("import", epilog="Example: pixnerd checkpoint import model.ckpt champion --trained-size 512")
def import_(
    file: Annotated[Path, typer.Argument(help="A published checkpoint: .ckpt, .pt, or .safetensors.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write the checkpoint to; new, or empty.")],
    network: Annotated[
        Literal["ema", "raw"] | None,
        typer.Option(
            help="Which of its networks: the running mean (ema), or the weights as trained (raw). [default: ema]"
        ),
    ] = None,
    trained_size: Annotated[
        int | None, typer.Option(help="Side in pixels of the images it was trained on; the file does not hold it.")
    ] = None,
    text_encoder: Annotated[
        str | None,
        typer.Option(help="Its text encoder: a published name, or a folder. [default: Qwen/Qwen3-1.7B, if that fits]"),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Turn a published file into a checkpoint's folder; task and sizes are read from the file."""
    from training import model as models
    from training.model.published import exchange

    doing(f"reading {file} and writing {folder}")
    exchange.import_file(file, folder, network=network, trained_size=trained_size, text_encoder=text_encoder)
    config, extra = models.read_config(folder)
    if json_:
        print_json({"folder": str(folder), "settings": config.model_dump(mode="json"), "extra": extra})
        return
    origin = exchange.provenance(extra)
    named = f" ({name})" if (name := preset_of(config)) else ""
    print(f"{folder}: the network {origin['network']} of {file.name}, {config.task} to image{named}")
    print(f"not imported: {_text(origin['skipped'])}")
    if config.image_size is None:
        print("its trained size is not known: without --trained-size N it draws squares of the size asked for only")
    if config.task == "text" and "text_encoder" not in extra:
        print("its text encoder is not known: without --text-encoder it cannot draw")


@app.command("export", epilog="Example: pixnerd checkpoint export champion model.ckpt")
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint's folder.")],
    file: Annotated[Path, typer.Argument(help="The PyTorch file to write.")],
    network: Annotated[
        Literal["ema", "raw", "both"] | None,
        typer.Option(
            help="Write the weights under the names of the running mean (ema), of the weights as trained (raw), or of "
            "both. [default: those that it was imported from, else ema]"
        ),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Write a checkpoint as a file for the published code.

    A network that the published code would compute otherwise is refused; the demo's is such a one. To export a network,
    train it with `preset: XXL/16`.
    """
    from training.model.published import exchange

    doing(f"reading {checkpoint} and writing {file}")
    facts = exchange.export_folder(checkpoint, file, network=network)
    if json_:
        print_json(facts)
        return
    print(f"{file}: {facts['tensors']} tensors under {', '.join(facts['prefixes'])}")
    if facts["left_out"]:
        print("its own text encoder has no place in this layout, and stays in the folder text of the checkpoint")


@app.command("fetch", epilog="Example: pixnerd checkpoint fetch sft champion --store runs/demo")
def fetch(
    stage: Annotated[str, typer.Argument(help=_WHICH)],
    folder: Annotated[Path, typer.Argument(help="Folder to write it to; new, or empty.")],
    store: Annotated[str, typer.Option("--store", help="The workflow's store.")],
    step: Annotated[int | None, typer.Option(help="Of the steps that export_every kept. [default: the last]")] = None,
    json_: JsonOption = False,
) -> None:
    """Copy a checkpoint of a train stage, the newest by default, from the store into an ordinary folder."""
    from infra import layout
    from infra.records import CheckpointRecord, read_record
    from infra.store import open_store
    from orchestration.artifacts import checkpoint_at, checkpoint_key, network_home
    from training import checkpoint as checkpoints

    doing(f"fetching {'the newest checkpoint' if step is None else f'step {step}'} of `{stage}`")
    opened = open_store(store)
    if step is not None:
        key = checkpoint_at(opened, network_home(opened, stage), step)
    elif layout.CHECKPOINT_AT.parse(stage) or layout.CHECKPOINT.parse(stage):
        key = stage
    else:
        key = checkpoint_key(opened, stage)
    _refuse_filled(folder)
    record = read_record(opened, key, CheckpointRecord)
    checkpoints.fetch(opened, record, folder)
    if json_:
        print_json(record.model_dump(mode="json"))
    else:
        print(f"step {record.step} of `{stage}` is in {folder}")


@app.command("ema", epilog="Example: pixnerd checkpoint ema sft wide --store runs/demo --sigma-rel 0.12")
def ema(
    stage: Annotated[str, typer.Argument(help=_WHICH)],
    store: Annotated[str, typer.Option("--store", help="The workflow's store.")],
    folder: Annotated[
        Path | None,
        typer.Argument(help="Folder to write the checkpoint to; new, or empty. [default: tell what was kept]"),
    ] = None,
    decay: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Of an exponential average: 0.9995.")] = None,
    sigma_rel: Annotated[
        float | None, typer.Option(min=0.0, max=0.288, help="Relative width of a power-function average: 0.12.")
    ] = None,
    step: Annotated[int | None, typer.Option(help="As of a step that was kept. [default: the last]")] = None,
    json_: JsonOption = False,
) -> None:
    """Make a checkpoint with another moving average of the weights, out of those that its training kept.

    A training keeps averages where `ema.keep_every`, `ema.more_decays` or `ema.sigma_rel` are set. One that it tracked
    itself is written as it was; any other is the combination of all kept ones that comes nearest to it, and what
    remains between them is told as the part of its weight that lies at other steps.
    """
    from infra.store import open_store
    from orchestration.artifacts import network_home
    from training import posthoc

    opened = open_store(store)
    home = network_home(opened, stage)
    if folder is None:
        _show_averages(posthoc.averages(opened, home), as_json=json_)
        return
    if (decay is None) == (sigma_rel is None):
        raise SettingsError("which average to make is not clear", remedy="give either --decay or --sigma-rel")
    if decay == 1 or sigma_rel == 0:
        raise SettingsError("such an average never moves, or is none", remedy="--decay below 1, --sigma-rel above 0")
    _refuse_filled(folder)
    doing(f"making an average out of those that `{stage}` kept")
    made = posthoc.make(opened, home, folder, decay=decay, sigma_rel=sigma_rel, step=step)
    if json_:
        print_json({"folder": str(folder), **made._asdict()})
        return
    how = f"decay {decay:g}" if decay is not None else f"sigma_rel {sigma_rel:g}"
    print(f"step {made.step} of `{stage}` with {how} is in {folder}")
    if made.averages == 1 and not made.misplaced:
        print("training tracked this average itself")
    else:
        print(f"made of {made.averages} averages; {made.misplaced:.2%} of its weight lies at other steps")


def _show_averages(records: Sequence[AveragesRecord], *, as_json: bool) -> None:
    kept = [{"step": r.step, "averages": [p.model_dump() for p in r.profiles.values()]} for r in records]
    if as_json:
        print_json(kept)
        return
    rows = [[f"{record.step:,}", ", ".join(map(_profile, record.profiles.values()))] for record in records]
    terminal.table(["step", "averages"], rows)


def _profile(profile: Profile) -> str:
    if profile.sigma_rel is not None:
        return f"sigma_rel {profile.sigma_rel:g}"
    return f"decay {profile.decay:g}{' after a warm-up' if profile.warmup else ''}"


def _refuse_filled(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise SettingsError(f"the folder {folder} is not empty", remedy="name a new one")
