"""Everything that has never met a GPU, in parts of at most eight minutes each. The figures go into RESULTS.md.

    make gpu                                  all parts
    make gpu ARGS='--parts kernels,train256'  these
    make gpu ARGS='--list'                    what there is, and which packages each part lacks here

It needs no network and no Ray. `--tiny --device cpu` runs the same code in seconds on a machine without a GPU; its
figures mean nothing, and are written only where `--out` says.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.gpu import results
from tests.gpu.parts import MINUTES, PARTS, Part
from tests.gpu.report import Options
from tests.gpu.results import NOT_RUN, Row

ROOT = Path(__file__).parents[2]


@dataclass
class Outcome:
    """What came of a part."""

    rows: list[Row] = field(default_factory=list)
    not_here: str = ""  # why it could not start
    error: str = ""  # why it ended early
    failed: bool = False  # a figure passed its bound

    def all_rows(self, part: Part) -> list[Row]:
        """Its figures; those that it did not reach say why, and do not keep what an earlier call has found."""
        if self.not_here:
            return []
        found = {row.figure: row for row in self.rows}
        why = f"{NOT_RUN}: {self.error or 'the part gave no such figure'}"
        return [found.get(name) or Row(part.name, name, why, floor) for name, floor in part.figures.items()]


def missing(part: Part, options: Options) -> list[str]:
    """The packages that a part needs and this machine lacks."""
    needs = part.needs | ({"triton": "triton"} if options.gpu else {})
    return [package for module, package in needs.items() if importlib.util.find_spec(module) is None]


def run_part(part: Part, options: Options, *, seconds: float = 60 * MINUTES, command: Sequence[str] = ()) -> Outcome:
    """The part in a process of its own, which is killed with all that it started when its time is over."""
    if packages := missing(part, options):
        return Outcome(not_here=f"missing packages: {', '.join(packages)}")
    with tempfile.TemporaryDirectory(prefix="pixnerd-gpu-") as folder:
        figures = Path(folder) / "figures"
        figures.touch()
        command = list(command) or [sys.executable, "-W", "ignore", "-m", "tests.gpu.child", *_arguments(part, options)]
        # What a killed part leaves in its temporary folder (encoders of gigabytes) goes with this one.
        process = subprocess.Popen(
            [*command, "--figures", str(figures)], cwd=ROOT, env=os.environ | {"TMPDIR": folder}, start_new_session=True
        )
        try:
            code, late = process.wait(seconds), False
        except subprocess.TimeoutExpired:
            code, late = 0, True
        finally:
            _end(process)
        outcome = _outcome(figures)
    if late:
        outcome.error = f"stopped after {seconds / 60:g} minutes"
    elif code and not outcome.not_here:
        outcome.error = outcome.error or (f"ended by signal {-code}" if code < 0 else f"exit code {code}")
    return outcome


def _arguments(part: Part, options: Options) -> list[str]:
    tiny = ["--tiny"] if options.tiny else []
    batch = ["--batch", str(options.batch)] if options.batch else []
    return [part.name, "--device", options.device, *tiny, *batch]


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and its children, which share its session."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _outcome(figures: Path) -> Outcome:
    outcome = Outcome()
    for line in figures.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            break  # the part was killed while it wrote
        fields = json.loads(line)
        if "row" in fields:
            outcome.rows.append(Row(**fields["row"]))
            outcome.failed |= fields["failed"]
        outcome.error = fields.get("error", outcome.error)
        outcome.not_here = fields.get("not_here", outcome.not_here)
    return outcome


def run(names: Sequence[str], options: Options, out: Path | None) -> int:
    """The parts in turn; the table is written after each of them, so that an ended day keeps what it found."""
    bad = False
    for name in names:
        print(f"== {name}: {PARTS[name].about}", flush=True)
        outcome = run_part(PARTS[name], options)
        if problem := outcome.not_here or outcome.error:
            print(f"{name}: {NOT_RUN if outcome.not_here else 'ended early'}: {problem}", flush=True)
        bad |= outcome.failed or bool(problem)
        if out is not None:
            reasons = {name: outcome.not_here} if outcome.not_here else {}
            results.write(out, results.merged(results.read(out), outcome.all_rows(PARTS[name]), reasons))
    return int(bad)


def show(options: Options) -> None:
    for part in PARTS.values():
        packages = missing(part, options)
        print(f"{part.name:18} {part.about}" + (f"  [missing: {', '.join(packages)}]" if packages else ""))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="make gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="names, separated by commas; empty: the table alone")
    parser.add_argument("--list", action="store_true", help="the parts, and what this machine lacks for them")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small networks: whether it runs, not how fast")
    parser.add_argument("--batch", type=int, help="images of a training step, where the default does not fit")
    parser.add_argument("--out", type=Path, help="the table; by default RESULTS.md, of a tiny run or a CPU's none")
    given = parser.parse_args(arguments)
    options = Options(given.device, given.tiny, given.batch)
    names = [name for name in given.parts.split(",") if name]
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"there is no part {', '.join(unknown)}; --list names them")
    if given.list:
        show(options)
        return 0
    out = given.out or (None if given.tiny or not options.gpu else results.RESULTS)
    if out is not None:
        results.write(out, results.merged(results.read(out), []))
    return run(names, options, out)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part under way is ended as well
    sys.exit(main())
