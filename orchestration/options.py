"""The options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestration.completion import recipe_names, setting_paths

StoreOption = Annotated[
    str | None, typer.Option("--store", help="Where it is kept: a folder or s3://bucket/prefix. [default: runs/RECIPE]")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Change a setting: of a stage (--set sft.steps=100), or of all stages of a kind (--set train.batch=16); "
        "may be repeated.",
        autocompletion=setting_paths,
    ),
]
RecipeArgument = Annotated[
    str, typer.Argument(help="A recipe's name, or the path of a .yaml file.", autocompletion=recipe_names)
]
OnOption = Annotated[str | None, typer.Option("--on", help="Ray cluster to use, HOST:6379. [default: start one here]")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done to each stage, and why.")]
RetryOption = Annotated[
    bool,
    typer.Option("--retry-failed", help="Download again what failed for causes that may pass: timeouts, DNS, 5xx."),
]
StoreOfShards = Annotated[str, typer.Option("--store", help="The store that holds the shards.")]
