"""`pixnerd status`, `explain` and `logs`: what the records in a store tell of runs, from any folder and machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestration.options import JsonOption
from orchestration.patience import doing
from orchestration.terminal import print_json

if TYPE_CHECKING:
    from orchestration.lease import Tried
    from orchestration.status import Explained, RunNow, Runs

app = typer.Typer()

StageArgument = Annotated[str, typer.Argument(help="The stage's name in its workflow.")]
StoreOption = Annotated[
    str | None,
    typer.Option("--store", help="Where it is kept: a folder or s3://bucket/prefix. [default: the folder in runs/]"),
]
WorkflowOption = Annotated[str | None, typer.Option("--workflow", help="Only runs of the workflow of this name.")]
RunOption = Annotated[
    str | None, typer.Option("--run", help="The run, as `pixnerd status` names it. [default: newest]")
]


def _runs(store: str | None) -> Runs:
    doing("reading the records of runs")
    from infra.store import open_store
    from orchestration.status import Runs

    return Runs(open_store(store or _only_store()))


def _only_store() -> str:
    """The store where `pixnerd run` keeps things if it is told of no other, if there is one only."""
    from infra.errors import SettingsError

    found = [path for path in sorted(Path("runs").glob("*")) if path.is_dir()]
    if len(found) != 1:
        known = f"one of {', '.join(map(str, found))}" if found else "a folder or s3://bucket/prefix"
        raise SettingsError("it must be said which store is meant", remedy=f"write --store with {known}")
    return str(found[0])


@app.command(epilog="Example: pixnerd status --store s3://my-bucket/pixnerd")
def status(
    store: StoreOption = None,
    last: Annotated[int, typer.Option("--last", min=1, help="Runs to show, besides those that are at work.")] = 5,
    json_: JsonOption = False,
) -> None:
    """Tell which runs are at work on a store or have ended there, and what has become of their stages."""
    runs = _runs(store)
    found = runs.look(runs.newest(last))
    if json_:
        print_json([_as_json(run) for run in found])
        return
    for run in found:
        _show(run)
    if len(runs.names) > len(found):
        print(f"{len(runs.names) - len(found):,} other runs, see --last")
    if not found:
        print(f"no run is recorded in {runs.store.url}")


@app.command(epilog="Example: pixnerd explain sft --store runs/demo")
def explain(
    stage: StageArgument,
    store: StoreOption = None,
    workflow: WorkflowOption = None,
    run: RunOption = None,
    json_: JsonOption = False,
) -> None:
    """Tell what has become of a stage, why its work was to be done, and who has tried it with what result."""
    found = _runs(store).explain(stage, workflow, run)
    if json_:
        print_json(_explained_as_json(found))
        return
    now = found.now
    print(f"{stage} ({now.kind} {now.digest}) in the run {found.run.run} of `{found.run.workflow}`")
    print(f"  state     {' - '.join(filter(None, (now.state, now.why)))}")
    print(f"  why       {found.reason}")
    print(f"  reads     {', '.join(dict.fromkeys(found.run.stages[stage].inputs.values())) or 'no other stage'}")
    for one in found.attempts:
        print(f"  attempt {one.attempt.number} by {one.attempt}: {_end_of(one)}")


@app.command(epilog="Example: pixnerd logs sft --store runs/demo")
def logs(
    stage: StageArgument,
    store: StoreOption = None,
    workflow: WorkflowOption = None,
    run: RunOption = None,
    attempt: Annotated[int | None, typer.Option("--attempt", min=1, help="Which one. [default: newest]")] = None,
) -> None:
    """Print the log of a stage's newest attempt, or of another one: progress, warnings, and a failure's traceback."""
    from infra.errors import DataError, NotFound

    runs = _runs(store)
    found = runs.explain(stage, workflow, run)
    numbers = [one.attempt.number for one in found.attempts]
    chosen = [one.attempt for one in found.attempts if attempt in (None, one.attempt.number)]
    if not chosen:
        known = f"it has {', '.join(map(str, numbers))}" if numbers else "an earlier version may have made it"
        raise DataError(f"`{stage}` has no such attempt", remedy=known)
    try:
        print(runs.store.get(chosen[-1].log).decode(), end="")
    except NotFound:
        raise DataError(
            f"attempt {chosen[-1].number} at `{stage}` has left no log",
            remedy="it was killed in its first seconds, or its store was away",
        ) from None


def _show(run: RunNow) -> None:
    record = run.record
    print(f"{record.run}  {record.workflow}  {' - '.join(filter(None, (run.state, run.why)))}")
    print(f"  {record}{f', git {record.git[:12]}' if record.git else ''}")
    for stage in run.stages.values():
        print(f"    {stage.stage:<14} {stage.state:<10} {stage.why}".rstrip())


def _end_of(one: Tried) -> str:
    if one.end is None:
        return "not ended"
    return " - ".join(filter(None, (f"{one.end.how} {one.end.at}", one.end.why)))


def _as_json(run: RunNow) -> dict[str, Any]:
    stages = {name: stage._asdict() for name, stage in run.stages.items()}
    return run.record.model_dump(mode="json") | {"state": run.state, "why": run.why, "stages": stages}


def _explained_as_json(found: Explained) -> dict[str, Any]:
    attempts = [
        one.attempt.model_dump(mode="json") | {"end": one.end and one.end.model_dump(mode="json")}
        for one in found.attempts
    ]
    return found.now._asdict() | {"run": found.run.run, "reason": found.reason, "attempts": attempts}
