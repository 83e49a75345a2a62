"""What is wrong between stages is found before any of them runs: by `--dry-run`, and by `run` before any work."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.errors import SettingsError
from orchestration import workflow
from pipelines import recipes

BUCKETS = "prepare.sizes=[16, 32, {name: b32, side: 32, step: 16}]"


def refusal(*assignments: str) -> str:
    with pytest.raises(SettingsError) as caught:
        workflow.graph(recipes.load("demo", assignments))
    return str(caught.value)


# What is set, and below it what is told.
CASES = """
high_data.size=64
    `high_data.size` is 64, which `prepare` does not prepare: it prepares 16, 32
BUCKETS  ;  high_data.size=b23
    `high_data.size` is b23, which `prepare` does not prepare: did you mean `b32`?
sft_data.filter=not duplicate and colured
    `sft_data.filter` names `colured`, which is no column of these shards: did you mean `coloured`?
sft_data.filter=zzz > 3
    `sft_data.filter` names `zzz`, which is no column of these shards: columns: accepted,
sft_data.filter=width >
    `sft_data.filter` is refused: the filter `width >` is not an expression
sft_data.filter=width > 3 & coloured
    `sft_data.filter` is refused:
sft_data.filter=width == 'big'
    `sft_data.filter` is refused: `width` (whole numbers) and `'big'` (text) cannot be compared
sft_data.filter=task > 3 and task == 'x'
    `sft_data.filter` is refused:
defaults.snapshot.filter=no_column
    `defaults.snapshot.filter` names `no_column`, which is no column
sft_data.filter=''  ;  sft_data.duplicates=3
    `sft_data.duplicates` is set, but the filter does not ask
sft_data.weights={shape: 2}
    `sft_data.weights.shape` means a source called `shape`, of which there are no shards: did you mean `shapes`?
sft_data.captions=[{source: web, weight: 1}]
    `sft_data.captions.0.source` means a source called `web`
low.preset=XL/16  ;  low.train_text=0
    `low.data` names `low_data`, which has no labels for this network to draw from
low_data.labels={column: lable, classes: 3}
    `low_data.labels.column` names `lable`, which is no column of these shards
low_data.labels={column: task, classes: 3}
    `low.data` names `low_data`, which is made for training by labels
high.model.hidden=48
    `high.model` is another network than that of `low`, whose weights it starts from (hidden 96 there, 48 here)
low.model.prediction=image  ;  low.objective.perceptual.lpips=0.1
    `low.objective.perceptual.lpips` needs a network that compares images, and `lpips` names none
low.data=prepare
    `low.data` names `prepare`, whose kind is prepare, not snapshot: name low_data or high_data or sft_data
low_score.checkpoint=low_data
    `low_score.checkpoint` names `low_data`, whose kind is snapshot, not train
gate.rules.1.above=low_scor
    `gate.rules.1.above` names `low_scor`, which is not among the gate's scores
register.model=mine/best
    `register.model`: 'mine/best' cannot be used: write letters, digits, blanks
register.alias=latest
    `register.alias`: 'latest' cannot be used
gate.rules.0.score=geneval/all
    `gate.rules.0.score` is geneval/all, which no evaluation has
"""


def cases() -> list[tuple[list[str], str]]:
    found = re.findall(r"^(\S.*)\n((?:    .*\n)+)", CASES, re.MULTILINE)
    return [(given.replace("BUCKETS", BUCKETS).split("  ;  "), " ".join(told.split())) for given, told in found]


@pytest.mark.parametrize(("assignments", "told"), cases(), ids=str)
def test_what_does_not_go_together_is_found_before_anything_runs(assignments: list[str], told: str):
    assert told in refusal(*assignments)


@pytest.mark.parametrize(
    "assignments",
    [
        ["sft_data.filter=coloured and task == 'x' and width * 2 > original_width"],
        ["sft_data.filter=task > 3"],  # nobody knows the types of a table's columns before it is read
        [
            "sft_data.filter=unknown > 3",
            "sft_data.scores=[0123456789abcdef]",
        ],  # nor the columns of another run's scores
        ["high.model.text_dim=96", "high.model.prediction=velocity"],
    ],
)
def test_what_may_go_together_is_let_through(assignments: list[str]):
    workflow.graph(recipes.load("demo", assignments))


def test_a_filter_may_ask_for_what_scores_say(tmp_path: Path):
    scorer = {"kind": "clip", "pretrained": "openai", "heads": [{"name": "aesthetic", "file": str(tmp_path / "head")}]}
    for name in ("head", "one.tar"):
        (tmp_path / name).write_bytes(b"")
    source = {"kind": "webdataset", "name": "web", "url": str(tmp_path), "keep": {"stars": "int"}}
    stages: dict[str, Any] = {
        "prepare": {"kind": "prepare", "sources": [source], "sizes": [16]},
        "clip": {"kind": "score", "shards": "prepare", "size": 16, "scorer": scorer},
        "data": {"kind": "snapshot", "shards": "prepare", "scored": ["clip"], "size": 16},
    }

    def graph(filter_: str, scored: list[str]) -> None:
        stages["data"] |= {"filter": filter_, "scored": scored}
        (tmp_path / "x.yaml").write_text(yaml.safe_dump({"name": "x", "stages": stages}))
        workflow.graph(recipes.load(str(tmp_path / "x.yaml")))

    graph("clip_score > 0.2 and aesthetic > 5 and stars > 3 and clip_failure is None", ["clip"])
    with pytest.raises(SettingsError, match=r"`data\.filter` names `clip_score`, which is no column"):
        graph("clip_score > 0.2", [])
    with pytest.raises(
        SettingsError, match=r"`data\.filter` is refused: `clip_score` \(fractions\) and `'x'` \(text\)"
    ):
        graph("clip_score > 'x'", ["clip"])
    stages["clip"]["size"] = 64
    with pytest.raises(SettingsError, match=r"`clip\.size` is 64, which `prepare` does not prepare"):
        graph("", ["clip"])
