"""The settings that choose a judge for GenEval, and the hash of its weights, which its verdicts depend on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from data_prep.scores.settings import ClipSettings, content_sha256, local_folder
from infra.config import Settings, digest, operational
from infra.errors import CheckpointError
from pipelines.evaluation.detector.weights import MASK2FORMER


class DetectorSettings(Settings):
    """GenEval's own judge: Mask2Former finds objects, and CLIP (OpenAI's ViT-L-14) tells their colours.

    The paths do not count towards results: the sha256 of what lies there does (see `identity`).
    """

    kind: Literal["mask2former"] = "mask2former"
    weights: str = operational(description="mmdetection's checkpoint, or a folder in transformers' layout")
    clip: str = operational(
        "openai", description="`openai`: downloaded by open_clip; or a file of its weights, or a folder with its config"
    )
    batch: int = Field(4, ge=1, description="pictures at once")
    tf32: bool = Field(False, description="on GPUs: multiply with fewer digits, which is faster and moves scores")

    @property
    def path(self) -> Path:
        return Path(self.weights).expanduser().absolute()

    @property
    def clip_settings(self) -> ClipSettings:
        if folder := local_folder(self.clip):
            return ClipSettings(model=str(folder))
        path = Path(self.clip).expanduser().absolute()
        return ClipSettings(model="ViT-L-14-quickgelu", pretrained=str(path) if path.is_file() else self.clip)

    def located(self) -> DetectorSettings:
        """These settings with absolute paths, for workers with another working directory."""
        clip = Path(self.clip).expanduser().absolute()
        return self.model_copy(update={"weights": str(self.path), "clip": str(clip) if clip.exists() else self.clip})

    def sha256s(self) -> dict[str, str]:
        """What the judge's networks are: the sha256 of local weights, the tag of those that open_clip downloads."""
        if not self.path.exists():
            raise CheckpointError(f"there is no file {self.path}", remedy=f"{MASK2FORMER}, and put it there")
        clip = self.clip_settings
        if clip.pretrained not in (None, "openai") and not clip.local():
            raise CheckpointError(f"there is no file {self.clip}", remedy="set judge.clip to a file, or to `openai`")
        local = next(iter(clip.local().values()), None)
        return {
            "mask2former": content_sha256(self.path),
            "clip": content_sha256(local) if local is not None else f"{clip.model} {clip.pretrained}",
        }


JudgeSettings = Literal["shapes"] | DetectorSettings


def identity(judge: JudgeSettings) -> dict[str, Any] | None:
    """What verdicts depend on besides the settings that count."""
    return None if judge == "shapes" else judge.sha256s()


def name_of(judge: JudgeSettings) -> str:
    return judge if judge == "shapes" else f"mask2former-{digest([judge.sha256s(), judge.chosen()])}"
