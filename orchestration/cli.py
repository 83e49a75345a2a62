"""The `pixnerd` command. Heavy imports are made inside the command functions, so that `--help` answers at once.

Exit codes: 0 done, 1 the work failed, 2 bad usage or settings, 130 or 143 stopped by SIGINT or SIGTERM. `stage` has two
more: 3 not promoted, 75 not now.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import typer
from typer.exceptions import TyperException

from infra import guard
from infra.causes import explained, first_line
from orchestration import patience
from orchestration.commands import (
    checkpoint,
    compare,
    data,
    doctor,
    evaluate,
    new,
    plan,
    sample,
    settings,
    status,
    sweep,
    workflow,
)

app = typer.Typer(
    name="pixnerd",
    help="Train a text-to-image model yourself: raw corpus in, measured and registered PixNerd out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Add --debug to any command to see a failure's whole traceback. Start with: pixnerd run demo",
)
for group in (new, plan, workflow, status, compare, sweep, sample, settings, doctor):
    app.add_typer(group.app)
for group in (evaluate, checkpoint, data):
    app.add_typer(group.app, name=group.__name__.rpartition(".")[2])


def _show_version(requested: bool) -> None:
    """Versions for a bug report, read from package metadata: importing the packages would take seconds."""
    if requested:
        from importlib.metadata import version
        from platform import python_version

        packages = ("torch", "ray", "deepspeed", "transformers", "mlflow")
        print(f"pixnerd {version('pixnerd')}")
        print(", ".join([f"Python {python_version()}", *(f"{name} {version(name)}" for name in packages)]))
        raise typer.Exit


def main() -> None:
    """The entry point: an error becomes one line that says what to do, and an exit code."""
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
        return str(error), 2  # no command was given: the text is the whole help
    if isinstance(error, TyperException):
        return f"error: {str(error).rstrip('.')} (see pixnerd {' '.join(command)} --help)", 2
    if known := explained(error):
        return f"error: {known}", known.exit_code
    # Anything else is a bug; even then users see one line, not a traceback.
    return f"internal error: {type(error).__name__}: {first_line(error)} (--debug shows where)", 1


@app.callback()
def _before_all(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the versions, and end.")
    ] = False,
) -> None:
    context.with_resource(patience.of_command())


if __name__ == "__main__":
    main()
