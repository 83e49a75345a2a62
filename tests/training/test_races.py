"""Two drivers on one training run: see races.py, which plays as many of them as are asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_two_drivers_killed_and_delayed_publish_the_undisturbed_model():
    # Five of these ten races have claims. Drivers are killed never, once or twice, alone or with their ranks.
    command = [sys.executable, "-W", "ignore", "-m", "tests.training.races", "--races", "10", "--seed", "0"]
    played = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1200, check=False
    )
    last = played.stdout.strip().splitlines()[-1:]
    assert played.returncode == 0, f"{last} {played.stderr[-3000:]}"
    assert json.loads(last[0]) == {"races": 10, "bad": {}}
