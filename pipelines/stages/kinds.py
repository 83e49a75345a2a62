"""Every kind of stage that a recipe may name.

    corpus -> prepare -> score -> snapshot -> encoders -> train -> sample, evaluate, dpg, fid -> gate -> register
    and a report at the end

A stage's function gets its context, its settings, and the records of the stages that its settings name. What it returns
becomes the `output` of its own record; later stages learn about it from there alone.
"""

from __future__ import annotations

from importlib.metadata import version

from pipelines.stages import data, dpg, fid, gate, measure, publish, train

KINDS = {kind.name: kind for family in (data, train, measure, dpg, fid, gate, publish) for kind in family.KINDS}


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("pixnerd", "torch", "deepspeed", "ray", "transformers")}
