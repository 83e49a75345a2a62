"""The workflow that tests run from end to end."""

from __future__ import annotations

from typing import Any

# The demo in small: every stage, two sizes, three training runs, in about a minute.
RECIPE: dict[str, Any] = {
    "name": "small",
    "extends": "demo",
    "tracking": {"experiment": "small"},
    "defaults": {
        "train": {"log_every": 2, "save_every": 4, "batch": 8},
        "evaluate": {"per_task": 2, "images": 2, "sampling": {"steps": 2, "batch": 4}},
        "dpg": {"per_task": 1, "images": 1, "sampling": {"steps": 2, "batch": 8}},
    },
    "stages": {
        "corpus": {"count": 240},
        "prepare": {"rows_per_shard": 60},
        **{name: {"steps": 30, "optim": {"warmup": 0}} for name in ("low", "high", "sft")},
        "gate": {"rules": [{"score": "geneval/overall", "at_least": 0.0}]},
    },
}
