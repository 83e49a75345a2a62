"""Records of stages that did not run, for tests of what is made of their outputs."""

from __future__ import annotations

from infra.records import Output, StageRecord


def record_of(output: Output, stage: str = "before") -> StageRecord:
    """The record of a stage that made this; nothing else in it matters."""
    return StageRecord(
        stage=stage,
        kind=output.kind,
        digest_of_work="d",
        inputs={},
        settings={},
        output=output,
        versions={},
        started="2026-01-01T00:00:00+00:00",
        seconds=1.0,
    )
