"""`pixnerd compare`: two evaluations of the same prompts, with what chance may explain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from orchestration.options import JsonOption

if TYPE_CHECKING:
    from pipelines.evaluation.compare import Compared

app = typer.Typer()

_WHICH = "An evaluation: a stage of --store, or the folder or store URL that `pixnerd evaluate --out` wrote."


@app.command(epilog="Example: pixnerd compare low_score sft_score --store runs/demo")
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help=_WHICH)],
    b: Annotated[str, typer.Argument(metavar="B", help="The other one, which is hoped to be better.")],
    store: Annotated[str | None, typer.Option("--store", help="The workflow's store, if A and B are stages.")] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    json_: JsonOption = False,
) -> None:
    """Compare two evaluations prompt by prompt: by how much B is better, and how sure that is.

    Both must be of the same prompts, seeds and judge. The interval is a bootstrap over prompts, which resamples the
    same prompts in both. The last column tells with how many prompts a difference of one point would show.
    """
    from orchestration.artifacts import evaluation
    from orchestration.terminal import print_json
    from pipelines.evaluation.compare import Side, compared

    sides = [Side(name, *evaluation(name, store)) for name in (a, b)]
    # `compared` tells how its first side differs from its second.
    found = compared(sides[1], sides[0], seed)
    if json_:
        about = {name: getattr(sides[0].report, name) for name in ("protocol", "judge", "prompts")}
        print_json({**about, "a": a, "b": b, "scores": {name: _plain(score) for name, score in found.items()}})
        return
    _show(a, b, found)


def _plain(score: Compared) -> dict[str, object]:
    difference = score.difference
    return {
        "a": score.b.model_dump(mode="json"),
        "b": score.a.model_dump(mode="json"),
        "difference": difference.interval.model_dump(mode="json"),
        "probability_of_improvement": difference.better,
        "prompts_to_show_one_point": difference.needed,
    }


def _show(a: str, b: str, found: dict[str, Compared]) -> None:
    from orchestration.terminal import table
    from pipelines.evaluation.statistics import NO_INTERVAL, ends, without_interval

    rows = []
    for name, score in found.items():
        change, needed = score.difference.interval, score.difference.needed
        sides = [f"{side.value:.3f} {'' if side.low is None else ends(side)}" for side in (score.b, score.a)]
        sure = f"{score.difference.better:.1%}"
        rows.append([name, *sides, f"{change.value:+.3f} {ends(change)}", sure, f"{needed:,}" if needed else "–"])
    table(["", a, b, "difference", "B is better", "prompts for a point"], rows)
    if any(without_interval(score.difference.interval) for score in found.values()):
        print(NO_INTERVAL)
