"""`pixnerd sample`: draw pictures with a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestration.options import JsonOption

app = typer.Typer()


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
        typer.Argument(help='What to draw: prompts, or the numbers or names of classes; "" draws without a prompt.'),
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
    guidance: Annotated[float | None, typer.Option(help="Strength; 1: none. [default: 4; for classes: 3.5]")] = None,
    interval: Annotated[
        str | None, typer.Option(help="Times between which guidance applies. [default: 0,1; for classes: 0.1,1]")
    ] = None,
    shift: Annotated[
        float | None, typer.Option(help="Time shift of the schedule. [default: 3; for classes: 1]")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Of the network's weights and activations: fp32 or bf16. [default: bf16 if saved so, else fp32]"
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, or one GPU: cuda:1.")] = "auto",
    batch: Annotated[int | None, typer.Option(help="Pictures that are drawn at once. [default: 32]")] = None,
    compile_: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Compile the network: slow to start, then faster. [default: no]"),
    ] = None,
    save_steps: Annotated[
        bool, typer.Option("--save-steps", help="Also write the picture after every step, in a folder for each.")
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Draw pictures with a checkpoint; the same call gives the same pixels.

    Options not given have the checkpoint's own defaults (`extra.sampling` in its config.json), else those below.
    """
    from orchestration import terminal
    from pipelines.sample.draw import SHEET, draw

    options = {
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
    with terminal.Screen(quiet=json_) as screen:
        screen.doing(f"reading {checkpoint}")
        drawn = draw(
            checkpoint,
            out,
            prompts or [],
            prompts_file=prompts_file,
            labels_file=labels,
            seeds=seeds,
            options={name: value for name, value in options.items() if value is not None},
            device=device,
            save_steps=save_steps,
            show=screen.count,
        )
    if json_:
        terminal.print_json({"folder": str(out), **drawn.index_json})
        return
    height, width = drawn.size
    new = f"{drawn.new} drawn on {drawn.device} in {drawn.seconds:.1f} s" if drawn.new else "there already"
    many = "1 picture" if drawn.pictures == 1 else f"{drawn.pictures} pictures"
    print(f"{many} of {height}x{width} (height x width) in {out}, {new}; see {out / SHEET}")
