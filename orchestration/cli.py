"""The `pixnerd` command. Heavy imports stand inside the commands, so that `--help` answers at once.

Exit codes: 0 done, 1 the work failed, 2 bad usage or settings, 130 or 143 stopped by SIGINT or SIGTERM.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer.exceptions import TyperException

from infra import guard
from infra.causes import explained, first_line
from orchestration import patience
from orchestration.completion import recipe_names, setting_paths

app = typer.Typer(
    name="pixnerd",
    help="Train a text-to-image model yourself: raw corpus in, measured and registered PixNerd out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Add --debug to any command to see a failure's whole traceback. Start with: pixnerd run demo",
)
evaluate_app = typer.Typer(no_args_is_help=True, help="Score a checkpoint.", rich_markup_mode=None)
checkpoint_app = typer.Typer(
    no_args_is_help=True, help="Look into checkpoints, and bring them in and out.", rich_markup_mode=None
)
data_app = typer.Typer(
    no_args_is_help=True, help="Look into prepared data, check it, tidy it up.", rich_markup_mode=None
)
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(data_app, name="data")

StoreOption = Annotated[
    str | None, typer.Option("--store", help="Where everything is kept: a folder or s3://bucket/prefix [runs/RECIPE].")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Change a setting: --set sft.steps=100 of a stage, --set train.batch=16 of all stages of a kind; may be "
        "repeated.",
        autocompletion=setting_paths,
    ),
]
RecipeArgument = Annotated[
    str, typer.Argument(help="A recipe's name, or the path of a .yaml file.", autocompletion=recipe_names)
]
OnOption = Annotated[str | None, typer.Option("--on", help="Address of a Ray cluster, HOST:6379; none: a local one.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done to each stage, and why.")]
RetryOption = Annotated[
    bool,
    typer.Option("--retry-failed", help="Download again what failed for causes that can pass: timeouts, DNS, 5xx."),
]


def _show_version(asked: bool) -> None:
    """What stands in a report of a fault; told from what is installed, without loading any of it."""
    if asked:
        from importlib.metadata import version
        from platform import python_version

        packages = ("torch", "ray", "deepspeed", "transformers", "mlflow")
        print(f"pixnerd {version('pixnerd')}")
        print(", ".join([f"Python {python_version()}", *(f"{name} {version(name)}" for name in packages)]))
        raise typer.Exit


def main() -> None:
    """The command's entry: errors become one line that says what to do, and an exit code."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments or bool(os.environ.get("PIXNERD_DEBUG"))
    arguments = [argument for argument in arguments if argument != "--debug"]

    def command() -> int:
        try:
            return app(args=arguments, prog_name="pixnerd", standalone_mode=False) or 0
        except typer.Abort:
            raise KeyboardInterrupt from None

    def explain(error: Exception) -> tuple[str, int]:
        text, code = _explained(error, arguments[:1])
        return (text, code) if not debug else ("".join(traceback.format_exception(error)), code)

    sys.exit(guard.run(command, explain, apart=not debug))


def _explained(error: Exception, command: list[str]) -> tuple[str, int]:
    if isinstance(error, TyperException) and str(error).startswith("Usage: "):
        return str(error), 2  # nothing was asked for, so this is the whole help
    if isinstance(error, TyperException):
        return f"error: {str(error).rstrip('.')} (see pixnerd {' '.join(command)} --help)", 2
    if found := explained(error):
        return f"error: {found.message}: {found.remedy}", found.exit_code
    # The last line of defence: a bug must not greet users with a traceback.
    return f"internal error: {type(error).__name__}: {first_line(error)} (--debug shows where)", 1


@app.callback()
def _before_all(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the versions, and end.")
    ] = False,
) -> None:
    context.with_resource(patience.of_command())


def _check_recipe(name: str, assignments: list[str] | None) -> None:
    """A mistake in it is told at once: what its stages are made of takes seconds to load."""
    from pipelines.recipes import load

    load(name, assignments or [])


@app.command(epilog="Example: pixnerd new photos --out mine.yaml")
def new(
    path: Annotated[
        str,
        typer.Argument(help="A folder of pictures with captions, tars, a table of URLs, Parquet; or a store's URL."),
    ],
    out: Annotated[Path | None, typer.Option("--out", help="The recipe to write. [default: NAME.yaml]")] = None,
    name: Annotated[str | None, typer.Option(help="What it is called. [default: as the folder or file]")] = None,
    kind: Annotated[
        str | None, typer.Option(help="Which kind of corpus it is, where several lie there: text_folder, url_list, ...")
    ] = None,
    image: Annotated[
        str | None, typer.Option(help="The column of pictures, names or URLs, if another one is found.")
    ] = None,
    captions: Annotated[
        list[str] | None, typer.Option("--captions", help="A column of captions, if others are found; repeatable.")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Look at your own pictures and captions, and write a recipe that trains a first small model on them."""
    from data_prep.survey import Wanted
    from orchestration.commands.new import new_recipe

    wanted = Wanted(kind, image, tuple(captions or ()))
    new_recipe(path, out=out, name=name, wanted=wanted, as_json=json_)


@app.command(epilog="Example: pixnerd run demo --store s3://my-bucket/pixnerd --set sft.steps=200")
def run(
    workflow: RecipeArgument,
    store: StoreOption = None,
    set_: SetOption = None,
    on: OnOption = None,
    retry_failed: RetryOption = False,
    dry_run: DryRunOption = False,
    json_: JsonOption = False,
) -> None:
    """Run a whole workflow: what is done is reused, what is missing is made."""
    _check_recipe(workflow, set_)
    from orchestration.commands.run import run_workflow

    run_workflow(
        workflow,
        store=store,
        assignments=set_ or [],
        address=on,
        dry_run=dry_run,
        as_json=json_,
        retry_failed=retry_failed,
    )


@app.command(epilog="Example: pixnerd prepare demo --store runs/demo")
def prepare(
    config: RecipeArgument,
    store: StoreOption = None,
    set_: SetOption = None,
    on: OnOption = None,
    retry_failed: RetryOption = False,
    dry_run: DryRunOption = False,
    json_: JsonOption = False,
) -> None:
    """Turn raw image-text pairs into shards: a recipe's prepare stages and what they need."""
    _check_recipe(config, set_)
    from orchestration.commands.run import run_workflow

    run_workflow(
        config,
        store=store,
        assignments=set_ or [],
        address=on,
        dry_run=dry_run,
        as_json=json_,
        until="prepare",
        retry_failed=retry_failed,
    )


@app.command(epilog="Example: pixnerd train demo --set low.steps=50 --store runs/try")
def train(
    recipe: RecipeArgument,
    store: StoreOption = None,
    set_: SetOption = None,
    on: OnOption = None,
    dry_run: DryRunOption = False,
    json_: JsonOption = False,
) -> None:
    """Train: a recipe's train stages and what they need, without evaluation."""
    _check_recipe(recipe, set_)
    from orchestration.commands.run import run_workflow

    run_workflow(recipe, store=store, assignments=set_ or [], address=on, dry_run=dry_run, as_json=json_, until="train")


@app.command(epilog='Example: pixnerd sample champion "a photo of a red circle" --out pictures --seeds 0-3')
def sample(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint's folder.")],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            help="Folder for the pictures, sheet.png and index.json. A second call draws what is missing; pictures "
            "of another call are never written over.",
        ),
    ],
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help='What to draw: prompts, or the numbers or names of classes; "" is the picture of nothing.'),
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option("--prompts", help="A .txt with a prompt a line, or a .jsonl of `prompt` and `seed` or `seeds`."),
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="The names of the classes, one a line, from class 0 on.")] = None,
    seeds: Annotated[str, typer.Option(help="One picture a seed: 0, 0-3, or 1,5,9.")] = "0",
    size: Annotated[
        str | None,
        typer.Option(help="512, or 768x1024: height, then width. [default: the size that it was trained at]"),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the solver. [default: 25; for classes: 50]")] = None,
    solver: Annotated[str | None, typer.Option(help="euler, heun, adams2, adams3 or adams4. [default: adams2]")] = None,
    guidance: Annotated[float | None, typer.Option(help="1: none. [default: 4; for classes: 3.5]")] = None,
    interval: Annotated[
        str | None, typer.Option(help="Times between which guidance applies. [default: 0,1; for classes: 0.1,1]")
    ] = None,
    shift: Annotated[
        float | None, typer.Option(help="Time shift of the schedule. [default: 3; for classes: 1]")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="fp32 or bf16, of the network's weights and activations. [default: bf16 if saved so, else fp32]"
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, or one GPU: cuda:1.")] = "auto",
    batch: Annotated[int | None, typer.Option(help="Pictures at once. [default: 32]")] = None,
    compile_: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Slow to start, then faster: for many pictures. [default: no]"),
    ] = None,
    save_steps: Annotated[
        bool, typer.Option("--save-steps", help="Also write the picture after every step, in a folder for each.")
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Draw pictures with a checkpoint; the same call gives the same pixels.

    What is not given is the checkpoint's own default (`sampling` in its config.json's extra), else the default below.
    """
    from pipelines.sample.draw import draw

    given = {
        "size": size,
        "steps": steps,
        "solver": solver,
        "guidance": guidance,
        "interval": interval,
        "shift": shift,
        "precision": precision,
        "batch": batch,
        "compile": compile_,
    }
    draw(
        checkpoint,
        out,
        prompts or [],
        prompts_file=prompts_file,
        labels_file=labels,
        seeds=seeds,
        options={name: value for name, value in given.items() if value is not None},
        device=device,
        save_steps=save_steps,
        as_json=json_,
    )


@evaluate_app.command(epilog="Example: pixnerd evaluate geneval champion --out scores")
def geneval(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint's folder.")],
    out: Annotated[str, typer.Option("--out", help="Folder or store URL for pictures, verdicts and the report.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting, e.g. --set images=8; may be repeated.")
    ] = None,
    on: OnOption = None,
    json_: JsonOption = False,
) -> None:
    """GenEval's six tasks, with 95 % intervals from a bootstrap over prompts."""
    from orchestration.commands.run import evaluate_folder

    evaluate_folder(checkpoint, out, set_ or [], address=on, as_json=json_)


@checkpoint_app.command("show", epilog="Example: pixnerd checkpoint show champion")
def checkpoint_show(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint's folder, or a published checkpoint's file.")],
    json_: JsonOption = False,
) -> None:
    """Task, sizes, parameters by part, and where it comes from; the weights are not read."""
    from orchestration.commands.checkpoint import show_checkpoint

    show_checkpoint(checkpoint, as_json=json_)


@checkpoint_app.command("import", epilog="Example: pixnerd checkpoint import model.ckpt champion --trained-size 512")
def checkpoint_import(
    file: Annotated[Path, typer.Argument(help="A published checkpoint: .ckpt, .pt, or .safetensors.")],
    folder: Annotated[Path, typer.Argument(help="The checkpoint's folder to make; new, or empty.")],
    network: Annotated[
        Literal["ema", "raw"] | None,
        typer.Option(help="Which of its networks: the running mean (ema), or the weights as trained. [default: ema]"),
    ] = None,
    trained_size: Annotated[
        int | None, typer.Option(help="Side of the images that it was trained on: the file does not tell it.")
    ] = None,
    text_encoder: Annotated[
        str | None,
        typer.Option(help="Its text encoder: a published name, or a folder. [default: Qwen/Qwen3-1.7B, if that fits]"),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Make a checkpoint's folder of a published file; task and sizes are found in it."""
    from orchestration.commands.checkpoint import import_checkpoint

    import_checkpoint(
        file, folder, network=network, trained_size=trained_size, text_encoder=text_encoder, as_json=json_
    )


@checkpoint_app.command("export", epilog="Example: pixnerd checkpoint export champion model.ckpt")
def checkpoint_export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint's folder.")],
    file: Annotated[Path, typer.Argument(help="The PyTorch file to write.")],
    network: Annotated[
        Literal["ema", "raw", "both"] | None,
        typer.Option(
            help="Under which network's names its weights are written: the running mean's (ema), those of the weights "
            "as trained (raw), or both. [default: those that it was imported from, else ema]"
        ),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Write a checkpoint as the published code's file.

    A network that this code would compute something else with is refused, as the demo's own is: one that shall be
    exported is trained with `preset: XXL/16`.
    """
    from orchestration.commands.checkpoint import export_checkpoint

    export_checkpoint(checkpoint, file, network=network, as_json=json_)


@checkpoint_app.command("fetch", epilog="Example: pixnerd checkpoint fetch sft champion --store runs/demo")
def checkpoint_fetch(
    stage: Annotated[str, typer.Argument(help="Name of the train stage.")],
    folder: Annotated[Path, typer.Argument(help="Folder to lay it out in.")],
    store: Annotated[str, typer.Option("--store", help="The workflow's store.")],
    json_: JsonOption = False,
) -> None:
    """Bring a workflow's newest checkpoint of a stage out of the store, as an ordinary folder."""
    from orchestration.commands.checkpoint import fetch_checkpoint

    fetch_checkpoint(stage, folder, store, as_json=json_)


StoreOfShards = Annotated[str, typer.Option("--store", help="The store that holds the shards.")]


@data_app.command("show", epilog="Example: pixnerd data show --store runs/demo --out pictures")
def data_show(
    store: StoreOfShards,
    size: Annotated[str | None, typer.Option(help="One of the sizes that were prepared. [default: all]")] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="A column of numbers to look at as well; repeatable.")
    ] = None,
    score: Annotated[
        list[str] | None, typer.Option(help="Scores or captions to look at as well: a stage, or a digest; repeatable.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for drawings of it, and for a sheet of samples.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the samples that are drawn.")] = 0,
    json_: JsonOption = False,
) -> None:
    """What was prepared: sources, sizes, captions, and what became of every input."""
    from orchestration.commands.data import show_data

    show_data(store, size=size, columns=column or [], scores=score or [], out=out, seed=seed, as_json=json_)


@data_app.command("verify", epilog="Example: pixnerd data verify --store runs/demo")
def data_verify(
    store: StoreOfShards,
    drop_damaged: Annotated[
        bool,
        typer.Option(
            "--drop-damaged",
            help="Delete damaged objects, and the records that keep what they belong to from being made again.",
        ),
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Read every shard, score and snapshot again and hold hashes, counts and order against the records."""
    from orchestration.commands.data import verify_data

    verify_data(store, drop_damaged=drop_damaged, as_json=json_)


@data_app.command("gc", epilog="Example: pixnerd data gc --store runs/demo --dry-run")
def data_gc(
    store: StoreOfShards,
    older_than_hours: Annotated[
        float, typer.Option(min=0, help="Younger data stays: a job may be about to write the record that names it.")
    ] = 24.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    json_: JsonOption = False,
) -> None:
    """Delete the data that no record names, such as what killed jobs left."""
    from orchestration.commands.data import collect_data

    collect_data(store, older_than_hours=older_than_hours, dry_run=dry_run, as_json=json_)


@data_app.command("forget", epilog="Example: pixnerd data forget withdrawn.txt --store runs/demo --reason 'asked to'")
def data_forget(
    items: Annotated[
        Path,
        typer.Argument(
            help="A text file (UTF-8) with an item a line, or a .parquet file with a column of them, called key, name, "
            "url, origin, sha256, image_sha256 or pixels_sha256."
        ),
    ],
    store: StoreOfShards,
    reason: Annotated[str, typer.Option(help="Why; it is kept with the list.")],
    twins: Annotated[bool, typer.Option(help="Forget what has the same pixels as well.")] = True,
    dry_run: DryRunOption = False,
    json_: JsonOption = False,
) -> None:
    """Take items out of every later snapshot, and say which snapshots and checkpoints have seen them.

    An item is called what its corpus calls it (images/00012.jpg), or by its URL, its key in the index, or the sha256 of
    its encoded image or of its pixels, in hex.
    """
    from orchestration.commands.data import forget_data

    forget_data(items, store, reason=reason, twins=twins, dry_run=dry_run, as_json=json_)


@data_app.command("export", epilog="Example: pixnerd data export data --store runs/mine --out exported")
def data_export(
    snapshot: Annotated[str, typer.Argument(help="Name of the snapshot stage, whose newest one it is; or a digest.")],
    store: StoreOfShards,
    out: Annotated[str, typer.Option("--out", help="Folder or store URL to write it to; new, or empty.")],
    layout: Annotated[
        Literal["webdataset", "huggingface"],
        typer.Option(help="Tars of .jpg, .json and .txt; or folders of pictures with a metadata.jsonl."),
    ] = "webdataset",
    tar_mib: Annotated[
        int | None, typer.Option("--tar-mib", min=1, help="What a tar of webdataset may come to. [default: 256]")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Write a snapshot's samples as files that others train from.

    Each is written as often as training lists it, with one caption as its text, drawn as the snapshot weighs them; all
    of them stand beside it with their weights. A second call goes on where the first was stopped.
    """
    from orchestration.commands.data import export_data

    export_data(snapshot, store, out, layout=layout, tar_mib=tar_mib, as_json=json_)


@app.command(epilog="Example: pixnerd report demo --out page.html")
def report(
    workflow: RecipeArgument,
    store: StoreOption = None,
    set_: SetOption = None,
    out: Annotated[Path, typer.Option("--out", help="The page to write.")] = Path("report.html"),
    json_: JsonOption = False,
) -> None:
    """Make the page of a workflow again, from the records that are there."""
    _check_recipe(workflow, set_)
    from orchestration.commands.run import make_report

    make_report(workflow, store=store, assignments=set_ or [], out=out, as_json=json_)


@app.command(epilog="Example: pixnerd settings train")
def settings(
    kind: Annotated[
        str | None,
        typer.Argument(help="A kind of stage: prepare, train, evaluate, ... [default: their list]"),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Every setting of a kind of stage: its type, its default, what it means, and whether it changes results."""
    from orchestration.commands.settings import show_settings

    show_settings(kind, as_json=json_)


@app.command(epilog="Example: pixnerd doctor --store s3://my-bucket/pixnerd")
def doctor(store: StoreOption = None, json_: JsonOption = False) -> None:
    """Say what is missing on this machine, and how to get it."""
    from orchestration.commands.doctor import examine
    from orchestration.terminal import print_json

    findings = examine(store)
    if json_:
        print_json([finding._asdict() for finding in findings])
    else:
        for finding in findings:
            print(f"{'ok     ' if finding.ok else 'MISSING'}  {finding.what}: {finding.found}")
            if finding.remedy:
                print(f"         -> {finding.remedy}")
    if not all(finding.ok or finding.optional for finding in findings):
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
