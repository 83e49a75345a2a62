"""Several ranks at every stage of ZeRO: killed and resumed to the same bytes, and each reads what another wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from tests.training.ranks import LOADED, STAGES, WRITTEN

FAST = ["zero-3", "zero-3-killed", "4-zero-1", "muon", "muon-alone", "options", "options-killed"]
FAST_NAMES = {"zero-3", "4-zero-1", "options"}
KILLED = ["zero-1", "zero-2", "zero-3", "muon", "bf16-exact", "averages", "options", "options-3", "options-exact"]
SLOW = [
    "ten-kills",
    *STAGES,
    *(f"{name}-killed" for name in KILLED if name not in FAST_NAMES),
    *(LOADED.keys() - FAST_NAMES),
]


class Runs(NamedTuple):
    folder: Path
    codes: dict[str, list[int]]

    def told(self, name: str) -> Any:
        return json.loads((self.folder / f"{name}.json").read_text())

    def state(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / f"{name}.safetensors")


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return made(tmp_path_factory.mktemp("fast"), FAST)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return made(tmp_path_factory.mktemp("slow"), SLOW)


@pytest.fixture
def runs(name: str, request: pytest.FixtureRequest) -> Runs:
    return request.getfixturevalue("fast" if name in FAST_NAMES else "slow")


def made(folder: Path, names: list[str]) -> Runs:
    command = [sys.executable, "-W", "ignore", "-m", "tests.training.ranks", str(folder), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return Runs(folder, json.loads((folder / "codes.json").read_text()))


def named(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[] if name in FAST_NAMES else pytest.mark.slow) for name in sorted(names)]


@pytest.mark.parametrize("name", named(KILLED))
def test_killed_ranks_resume_to_the_same_bytes(name: str, runs: Runs):
    """Twenty steps are seven and thirteen: losses, and so the order of samples, weights, moments and averages."""
    assert runs.codes[f"{name}-killed"] == [-9, -9]
    assert runs.codes[name] == runs.codes[f"{name}-resumed"] == [0, 0]
    straight, resumed = runs.told(name), runs.told(f"{name}-killed")
    assert len(straight["losses"]) == 14
    assert len(straight["validated"]) == 2
    assert straight == resumed
    expected, state = runs.state(name), runs.state(f"{name}-killed")
    assert expected.keys() == state.keys()
    assert all(torch.equal(expected[tensor], state[tensor]) for tensor in expected)


@pytest.mark.parametrize("name", named(LOADED))
def test_other_ranks_and_stages_load_the_state_bit_for_bit(name: str, runs: Runs):
    assert set(runs.codes[name]) == {0}
    written, loaded = runs.state(WRITTEN.get(name, "zero-3")), runs.state(name)
    assert written.keys() == loaded.keys()
    assert all(torch.equal(written[tensor], loaded[tensor]) for tensor in written)


@pytest.mark.slow
def test_killed_ranks_leave_all_averages_and_checkpoints_on_the_way(slow: Runs):
    """That they are the same after a kill is held above; here that they are there, and the first is as ever."""
    told, state = slow.told("averages"), slow.state("averages")
    assert sorted(told["kept"]) == [f"/averages/{step:08d}.json" for step in (7, 14, 20)]
    assert sorted(told["on the way"]) == [f"/checkpoints/{step:08d}.json" for step in (7, 14)]
    assert {len(hashes) for hashes in told["kept"].values()} == {2 * 4}  # of two ranks
    kinds = {name.partition("/")[0] for name in state}
    assert kinds >= {"ema", "ema-decay-0.5", "ema-sigma-0.05", "ema-sigma-0.1"}
    plain = slow.state("zero-2")
    assert all(torch.equal(plain[name], state[name]) for name in plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero-2", "zero-3", "offload", "bf16-exact", "bf16-3", "compiled-3"])
def test_all_stages_learn_the_same(name: str, slow: Runs):
    near = 1e-4 if "bf16" not in name else 1e-2
    for losses in ("losses", "validated"):
        assert slow.told(name)[losses] == pytest.approx(slow.told("zero-1")[losses], rel=near)


@pytest.mark.slow
def test_blocks_that_are_computed_anew_learn_the_same_to_the_bit_at_zero_3(slow: Runs):
    expected, state = slow.state("zero-3"), slow.state("anew-3")
    assert all(torch.equal(expected[tensor], state[tensor]) for tensor in expected)
    assert slow.told("anew-3")["losses"] == slow.told("zero-3")["losses"]


@pytest.mark.slow
def test_a_run_that_is_killed_ten_times_ends_as_one_that_was_not(slow: Runs):
    assert slow.codes["ten-kills"] == [-9, -9] * 10 + [0, 0]
    assert slow.told("ten-kills")["losses"][-1] == slow.told("each-step")["losses"][-1]
    expected, state = slow.state("each-step"), slow.state("ten-kills")
    assert all(torch.equal(expected[tensor], state[tensor]) for tensor in expected)


def test_muon_on_two_ranks_is_muon_on_one(fast: Runs):
    """Matrices that lie across the border of two ranks' ranges are put together again."""
    one, two = fast.state("muon-alone"), fast.state("muon")
    assert one.keys() == two.keys()
    assert "exp_avg/net.trunk.0.mlp.out.weight" in one
    assert "exp_avg_sq/net.trunk.0.mlp.out.weight" not in one  # Muon has no second moment
    for tensor in one:
        assert torch.allclose(one[tensor], two[tensor], rtol=1e-3, atol=1e-5), tensor
    assert fast.told("muon")["validated"] == pytest.approx(fast.told("muon-alone")["validated"], rel=1e-3)
    assert fast.told("muon")["losses"][-1] != fast.told("zero-3")["losses"][-1]
