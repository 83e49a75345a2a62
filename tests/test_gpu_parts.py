"""The parts of `make gpu`, run small on a CPU as if Ray, MLflow and the rest were not installed; and the table."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu import __main__ as command
from tests.gpu import results
from tests.gpu.bare import REFUSED
from tests.gpu.parts import MODES, OPERATIONS, PARTS, TB_PER_SECOND, TRAFFIC_FLOOR
from tests.gpu.report import Options
from tests.gpu.results import NOT_RUN, Row

pytestmark = pytest.mark.timeout(900)  # the process of all parts takes a minute of CPU, and others use it as well
# What is small has one size: the parts at 512 px would run the same once more.
RUN = [name for name in PARTS if "512" not in name]
CPU = Options("cpu", tiny=True)
KERNELS = PARTS["kernels"]


Lines = dict[str, list[dict[str, object]]]


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Lines:
    return run(tmp_path_factory.mktemp("parts"), RUN)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Lines:
    return run(tmp_path_factory.mktemp("resume"), ["resume"])


def run(folder: Path, names: list[str]) -> Lines:
    """What each part has handed out, from one process, as PyTorch takes seconds to import."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    made = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.gpu.bare", str(folder), *names],
        cwd=command.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-4000:]
    return {name: [json.loads(line) for line in (folder / name).read_text().splitlines()] for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_a_part_gives_all_its_figures_on_a_bare_machine(lines: Lines, name: str):
    rows = [Row(**line["row"]) for line in lines[name]]  # type: ignore[arg-type]
    assert {row.figure for row in rows} == PARTS[name].figures.keys()
    assert all(row.was_run and row.measured and ", CPU, torch" in row.where for row in rows)
    assert not any(line["failed"] for line in lines[name])


def test_resumed_on_a_cpu_it_is_the_same_bit_for_bit(resumed: Lines):
    told = {line["row"]["figure"]: line["row"]["measured"] for line in resumed["resume"]}  # type: ignore[index]
    for precision in ("fp32", "bf16"):
        assert told[f"{precision}: the state of a fused AdamW, loaded"] == "the same bits True, fused True, steps [4.0]"
        run = told[f"{precision}: a killed and resumed run against a straight one"]
        assert run == "0.0e+00 of the largest weight (two straight runs: 0.0e+00)"


def test_what_the_parts_need_is_not_what_is_refused():
    assert not REFUSED & {module for part in PARTS.values() for module in part.needs}


def test_a_wrong_kernel_and_a_lost_value_pass_the_bound():
    import torch

    from tests.gpu import kernels

    case = kernels.TINY["field"][0]()
    truth = kernels.results(case.twin, case.leaves, torch.float64)
    found = kernels.results(case.kernel, case.leaves, torch.float32)
    assert max(kernels.errors(found, truth)) < 2e-6
    found[1][0, 0, 0] += 1e-3
    assert kernels.errors(found, truth).forward < 2e-6 < kernels.errors(found, truth).backward
    found[0][0, 0, 0] = float("nan")
    assert kernels.errors(found, truth).forward == float("inf")


def test_the_floors_of_the_kernels_are_their_traffic():
    from tests.bench import bench_kernels

    sizes = bench_kernels.Sizes(device="meta")
    for name in OPERATIONS:
        bytes_each = [tensor.numel() * tensor.element_size() for tensor in bench_kernels.CASES[name](sizes)[2]]
        for mode, floor in zip(MODES, TRAFFIC_FLOOR[name], strict=True):
            assert bench_kernels.traffic(mode, bytes_each) / TB_PER_SECOND / 1e9 == pytest.approx(floor, rel=0.01)


# The table


def test_the_table_here_lists_every_figure():
    rows = results.read(results.RESULTS)
    wanted = [(row.part, row.figure) for row in results.planned()]
    assert [(row.part, row.figure) for row in rows] == wanted, "python -m tests.gpu --parts= writes it anew"
    assert results.RESULTS.read_text() == results.text(rows)


def row(figure: int, measured: str, part: str = "kernels") -> Row:
    name, floor = list(PARTS[part].figures.items())[figure]
    return Row(part, name, measured, floor, "then")


def test_rows_of_other_parts_stay(tmp_path: Path):
    table = tmp_path / "RESULTS.md"
    results.write(table, results.merged([], [row(0, "1 | 2\n3"), row(0, "480", "train256")]))
    results.write(table, results.merged(results.read(table), [row(0, "481", "train256")]))
    found = {(row.part, row.figure): row for row in results.read(table)}
    assert found[row(0, "")[:2]].measured == "1 / 2 3"
    assert found[row(0, "", "train256")[:2]].measured == "481"
    assert [one.measured for one in results.read(table) if one.was_run] == ["1 / 2 3", "481"]
    assert not [path for path in tmp_path.iterdir() if path != table]


def test_what_could_not_start_takes_no_figure_away():
    rows = results.merged([row(0, "1e-7")], [], {"kernels": "missing packages: triton"})
    assert rows[0].measured == "1e-7"
    assert rows[1].measured == "not run: missing packages: triton"
    again = results.merged(rows, [row(0, "480", "train256")])
    assert again[1].measured == "not run: missing packages: triton"


def test_what_ended_early_does_not_keep_old_figures():
    outcome = command.Outcome(rows=[row(0, "2e-7")], error="ended by signal 9")
    rows = results.merged([row(0, "1e-7"), row(1, "3e-7")], outcome.all_rows(KERNELS))
    assert [one.measured for one in rows[:2]] == ["2e-7", "not run: ended by signal 9"]


# The processes

WRITES = "import sys, json; f = open(sys.argv[2], 'a'); f.write(json.dumps({line}) + chr(10)); f.flush(); {then}"


def child(then: str) -> list[str]:
    line = {"row": row(0, "1e-7")._asdict(), "failed": False}
    return [sys.executable, "-c", WRITES.format(line=repr(line), then=then)]


def test_a_part_that_takes_too_long_is_ended():
    outcome = command.run_part(KERNELS, CPU, seconds=1, command=child("import signal; signal.pause()"))
    assert [one.measured for one in outcome.rows] in ([], ["1e-7"])  # a busy machine may not even have started it
    assert outcome.error == "stopped after 0.0166667 minutes"


def test_a_part_that_crashes_says_how_and_its_half_line_is_left_out():
    then = "f.write('{'); f.flush(); import os; os.kill(os.getpid(), 11)"
    outcome = command.run_part(KERNELS, CPU, command=child(then))
    assert [one.measured for one in outcome.rows] == ["1e-7"]
    assert outcome.error == "ended by signal 11"


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(KERNELS.needs, "no_such_module", "no-such-package")
    outcome = command.run_part(KERNELS, CPU)
    assert outcome.not_here == "missing packages: no-such-package"
    assert command.main(["--list", "--device", "cpu"]) == 0
    assert "[missing: no-such-package" in capsys.readouterr().out


def test_a_name_that_is_no_part_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as refused:
        command.main(["--parts", "kernels,trian256"])
    assert refused.value.code == 2
    assert "there is no part trian256" in capsys.readouterr().err


def test_a_tiny_run_leaves_the_table_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "RESULTS.md")
    monkeypatch.setattr(command, "run_part", lambda part, options: command.Outcome(rows=[row(0, "1e-7")], failed=True))
    assert command.main(["--parts", "kernels", "--tiny", "--device", "cpu"]) == 1
    assert not results.RESULTS.exists()
    assert command.main(["--parts", "kernels"]) == 1
    assert results.read(results.RESULTS)[0].measured == "1e-7"


def test_the_makefile_names_parts_that_are_there():
    for text in (command.ROOT / "Makefile", command.ROOT / "README.md", command.ROOT / "CONTRIBUTING.md"):
        for names in re.findall(r"--parts ([\w,]+)", text.read_text(encoding="utf-8")):
            assert set(names.split(",")) <= PARTS.keys(), text
    assert NOT_RUN not in PARTS
