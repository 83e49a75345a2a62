"""The `pixnerd` command. Heavy imports stand inside the commands, so that `--help` answers at once.

Exit codes: 0 done, 1 the work failed, 2 bad usage or settings.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

from infra.errors import PixnerdError

app = typer.Typer(
    name="pixnerd",
    help="Train a text-to-image model yourself: raw corpus in, measured and registered PixNerd out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Add --debug to any command to see a failure's whole traceback. Start with: pixnerd run demo",
)
evaluate_app = typer.Typer(no_args_is_help=True, help="Score a checkpoint.", rich_markup_mode=None)
checkpoint_app = typer.Typer(no_args_is_help=True, help="Look into checkpoints and fetch them.", rich_markup_mode=None)
data_app = typer.Typer(no_args_is_help=True, help="Look into prepared data and check it.", rich_markup_mode=None)
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(data_app, name="data")

StoreOption = Annotated[
    str | None, typer.Option("--store", help="Where everything is kept: a folder or s3://bucket/prefix [runs/RECIPE].")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Change a setting, e.g. --set sft.steps=100; may be repeated.")
]
OnOption = Annotated[str | None, typer.Option("--on", help="Address of a Ray cluster; none: a local one.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done to each stage, and why.")]


def main() -> None:
    """The command's entry: errors become one line that says what to do, and an exit code."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments or bool(os.environ.get("PIXNERD_DEBUG"))
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        sys.exit(app(args=arguments, prog_name="pixnerd", standalone_mode=False) or 0)
    except PixnerdError as error:
        if debug:
            raise
        _fail(f"error: {error.message}: {error.remedy}", error.exit_code)
    except TyperException as error:
        _fail(f"error: {str(error).rstrip('.')} (see pixnerd {' '.join(arguments[:1])} --help)", 2)
    except (KeyboardInterrupt, typer.Abort):
        _fail("stopped; the same command goes on from here", 130)
    except Exception as error:  # the last line of defence: a bug must not greet users with a traceback
        if debug:
            raise
        text = str(error).strip().splitlines()
        _fail(f"internal error: {type(error).__name__}: {text[0] if text else ''} (--debug shows where)", 1)


def _fail(text: str, code: int) -> None:
    print(text, file=sys.stderr)
    sys.exit(code)


@app.command(epilog="Example: pixnerd run demo --store s3://my-bucket/pixnerd --set sft.steps=200")
def run(
    workflow: Annotated[str, typer.Argument(help="A recipe's name, or the path of a .yaml file.")],
    store: StoreOption = None,
    set_: SetOption = None,
    on: OnOption = None,
    dry_run: DryRunOption = False,
    json_: JsonOption = False,
) -> None:
    """Run a whole workflow: what is done is reused, what is missing is made."""
    from orchestration.session import run_workflow

    run_workflow(workflow, store=store, assignments=set_ or [], address=on, dry_run=dry_run, as_json=json_)


@app.command(epilog="Example: pixnerd prepare demo --store runs/demo")
def prepare(
    config: Annotated[str, typer.Argument(help="A recipe's name or path; its prepare stages are run.")],
    store: StoreOption = None,
    set_: SetOption = None,
    on: OnOption = None,
    dry_run: DryRunOption = False,
    json_: JsonOption = False,
) -> None:
    """Turn raw image-text pairs into shards: a recipe's prepare stages and what they need."""
    from orchestration.session import run_workflow

    run_workflow(
        config, store=store, assignments=set_ or [], address=on, dry_run=dry_run, as_json=json_, until="prepare"
    )


@app.command(epilog="Example: pixnerd train demo --set low.steps=50 --store runs/try")
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or path; its train stages are run.")],
    store: StoreOption = None,
    set_: SetOption = None,
    on: OnOption = None,
    dry_run: DryRunOption = False,
    json_: JsonOption = False,
) -> None:
    """Train: a recipe's train stages and what they need, without evaluation."""
    from orchestration.session import run_workflow

    run_workflow(recipe, store=store, assignments=set_ or [], address=on, dry_run=dry_run, as_json=json_, until="train")


@app.command(epilog='Example: pixnerd sample champion "a photo of a red circle" --out pictures --seeds 0-3')
def sample(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint's folder.")],
    prompts: Annotated[list[str], typer.Argument(help="What to draw; several prompts give several pictures.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the pictures.")],
    seeds: Annotated[str, typer.Option(help="One picture a seed: 0, 0-3, or 1,5,9.")] = "0",
    steps: Annotated[int, typer.Option(min=1)] = 25,
    guidance: Annotated[float, typer.Option(help="1: none.")] = 4.0,
    solver: Annotated[str, typer.Option(help="euler, heun, adams2, adams3 or adams4.")] = "adams2",
    shift: Annotated[float, typer.Option(help="Time shift of the schedule.")] = 3.0,
    json_: JsonOption = False,
) -> None:
    """Draw pictures with a checkpoint; the same call gives the same pixels."""
    from orchestration.session import draw

    settings = {"steps": steps, "guidance": guidance, "solver": solver, "shift": shift}
    draw(checkpoint, prompts, out, seeds, settings, as_json=json_)


@evaluate_app.command(epilog="Example: pixnerd evaluate geneval champion --out scores")
def geneval(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint's folder.")],
    out: Annotated[str, typer.Option("--out", help="Folder or store URL for pictures, verdicts and the report.")],
    set_: SetOption = None,
    on: OnOption = None,
    json_: JsonOption = False,
) -> None:
    """GenEval's six tasks, with 95 % intervals from a bootstrap over prompts."""
    from orchestration.session import evaluate_folder

    evaluate_folder(checkpoint, out, set_ or [], address=on, as_json=json_)


@checkpoint_app.command("show", epilog="Example: pixnerd checkpoint show champion")
def checkpoint_show(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint's folder.")], json_: JsonOption = False
) -> None:
    """Task, sizes, and parameters by part."""
    from orchestration.session import show_checkpoint

    show_checkpoint(checkpoint, as_json=json_)


@checkpoint_app.command("fetch", epilog="Example: pixnerd checkpoint fetch sft champion --store runs/demo")
def checkpoint_fetch(
    stage: Annotated[str, typer.Argument(help="Name of the train stage.")],
    folder: Annotated[Path, typer.Argument(help="Folder to lay it out in.")],
    store: Annotated[str, typer.Option("--store", help="The workflow's store.")],
    json_: JsonOption = False,
) -> None:
    """Bring a workflow's newest checkpoint of a stage out of the store, as an ordinary folder."""
    from orchestration.session import fetch_checkpoint

    fetch_checkpoint(stage, folder, store, as_json=json_)


@data_app.command("show", epilog="Example: pixnerd data show --store runs/demo")
def data_show(
    store: Annotated[str, typer.Option("--store", help="The store that holds the shards.")], json_: JsonOption = False
) -> None:
    """What was prepared: shards, sizes, and what became of every input."""
    from orchestration.session import show_data

    show_data(store, as_json=json_)


@data_app.command("verify", epilog="Example: pixnerd data verify --store runs/demo")
def data_verify(
    store: Annotated[str, typer.Option("--store", help="The store that holds the shards.")], json_: JsonOption = False
) -> None:
    """Read every shard again and hold hashes, counts and order against the records."""
    from orchestration.session import verify_data

    verify_data(store, as_json=json_)


@app.command(epilog="Example: pixnerd report demo --out page.html")
def report(
    workflow: Annotated[str, typer.Argument(help="A recipe's name or path.")],
    store: StoreOption = None,
    set_: SetOption = None,
    out: Annotated[Path, typer.Option("--out", help="The page to write.")] = Path("report.html"),
    json_: JsonOption = False,
) -> None:
    """Make the page of a workflow again, from the records that are there."""
    from orchestration.session import make_report

    make_report(workflow, store=store, assignments=set_ or [], out=out, as_json=json_)


@app.command(epilog="Example: pixnerd doctor --store s3://my-bucket/pixnerd")
def doctor(store: StoreOption = None, json_: JsonOption = False) -> None:
    """Say what is missing on this machine, and how to get it."""
    from orchestration.doctor import examine
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
