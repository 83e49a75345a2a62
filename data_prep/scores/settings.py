"""Settings of scorers, and their identity for digests, in which a sha256 stands in place of a path to local weights."""

from __future__ import annotations

from abc import abstractmethod
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field, field_validator, model_validator

from infra.config import Fraction, Secret, Settings, digest, operational, spelt
from infra.errors import CheckpointError
from infra.files import sha256_of
from infra.shards import INDEX_SCHEMA

# Filter expressions name columns, so a column's name must be an identifier.
Column = Annotated[
    str, spelt(r"[A-Za-z_][A-Za-z0-9_]{0,62}", "a word of at most 63 letters, digits and `_`, no digit first")
]
Dtype = Literal["float32", "bfloat16", "float16"]

# The kinds of files in a model's folder that can change its output.
_MODEL_FILES = (".json", ".safetensors", ".bin", ".pt", ".pth", ".npz", ".txt", ".model", ".jinja")


class Weighed(Settings):
    """Settings of a model, some of which may name local files with its weights."""

    def local(self) -> dict[str, Path]:
        """The settings that name a file or folder of this machine, with its absolute path."""
        return {}

    def identity(self) -> dict[str, Any]:
        """The settings that its results depend on, with the sha256 of a local file in place of its path."""
        return self.chosen() | {name: {"sha256": content_sha256(path)} for name, path in self.local().items()}

    def located(self) -> Self:
        """These settings with absolute paths, for workers with another working directory."""
        return self.model_copy(update={name: str(path) for name, path in self.local().items()})


class _ScorerSettings(Weighed):
    joined: ClassVar[frozenset[str]] = frozenset()  # columns of the index to which the side table's values are added

    name: Column

    @abstractmethod
    def columns(self) -> list[str]:
        """The side table's columns, without `key`."""

    @property
    def failure(self) -> str:
        """The column of causes. It has the scorer's name, so that several side tables can be joined to one index."""
        return f"{self.name}_failure"

    @model_validator(mode="after")
    def _own_columns(self) -> _ScorerSettings:
        taken = [*INDEX_SCHEMA.names, "duplicate"]
        for name in self.columns():
            if name in taken and name not in self.joined:
                raise ValueError(f"the column `{name}` occurs twice, or is one of the index's: give another name")
            taken.append(name)
        return self


class Head(Settings):
    """A linear layer, or a chain of them, on CLIP's image features, one value an image."""

    name: Column = Field(description="the column")
    file: str = Field(description="safetensors or .pt/.pth: a state dict of linear layers, in the order of their names")
    normalise: bool = Field(True, description="features of length 1, as LAION's predictors were trained on")
    between: Literal["none", "relu", "gelu"] = Field("none", description="the activation between two layers")
    output: Literal["none", "sigmoid", "softmax"] = "none"
    index: int = Field(0, ge=0, description="which of the last layer's values")

    @property
    def path(self) -> Path:
        return Path(self.file).expanduser().absolute()


class ClipSettings(_ScorerSettings):
    """`NAME_score`: the cosine of the image and its best caption; `NAME_score_KIND`: its best caption of that kind."""

    kind: Literal["clip"] = "clip"
    name: Column = "clip"
    model: str = Field(
        "ViT-B-32", description="open_clip's name, hf-hub:owner/name, or a folder with open_clip_config.json"
    )
    pretrained: str | None = Field(None, description="open_clip's tag or a checkpoint file, for a model by name")
    kinds: list[Column] = Field([], description="the only kinds of captions that count, a column each; none: all")
    heads: list[Head] = Field([], description="further columns, from the same features of the image")
    dtype: Dtype = "float32"
    batch_size: int = operational(32, ge=1)

    def columns(self) -> list[str]:
        kinds = [f"{self.name}_score_{kind}" for kind in self.kinds]
        return [f"{self.name}_score", *kinds, *(head.name for head in self.heads), self.failure]

    @property
    def folder(self) -> Path | None:
        """The folder of a local model, None for a model by name."""
        return local_folder(self.model.removeprefix("local-dir:"))

    @model_validator(mode="after")
    def _weights_are_named(self) -> ClipSettings:
        has_weights = self.model.startswith(("local-dir:", "hf-hub:")) or self.folder is not None
        if has_weights == (self.pretrained is not None):
            raise ValueError("`pretrained` names the weights of a model by name; a folder or hub model has its own")
        return self

    def local(self) -> dict[str, Path]:
        checkpoint = Path(self.pretrained or "").expanduser()
        local = {"pretrained": checkpoint.absolute()} if checkpoint.is_file() else {}  # else it is a tag of open_clip's
        return local | ({"model": self.folder} if self.folder is not None else {})

    def identity(self) -> dict[str, Any]:
        identity = super().identity()
        for head, settings in zip(identity.get("heads", []), self.heads, strict=True):
            head["file"] = {"sha256": file_sha256(settings.path)}
        return identity

    def located(self) -> Self:
        heads = [head.model_copy(update={"file": str(head.path)}) for head in self.heads]
        return super().located().model_copy(update={"heads": heads})


class Ask(Settings):
    """One caption of every image."""

    kind: Annotated[str, spelt(r"[ -~]{1,64}", "1 to 64 letters of ASCII")] = Field(description="the caption's kind")
    prompt: str = Field(min_length=1, max_length=20_000)
    max_tokens: int = Field(256, ge=1, le=8192)


class _CaptionerSettings(_ScorerSettings):
    joined = frozenset({"captions"})

    name: Column = "captioner"
    asks: list[Ask] = Field(min_length=1, description="several, for captions of several lengths")

    def columns(self) -> list[str]:
        return ["captions", self.failure]

    @field_validator("asks")
    @classmethod
    def _distinct_kinds(cls, asks: list[Ask]) -> list[Ask]:
        if len({ask.kind for ask in asks}) < len(asks):
            raise ValueError("two captions have one kind: the caption mix could not tell them apart")
        return asks


class Vlm(Weighed):
    """A vision-language model of transformers' format."""

    model: str = Field(description="a hub model's name, or a folder with its files")
    revision: str | None = Field(None, description="of a hub model: a commit, so that later runs load the same weights")
    dtype: Dtype = "bfloat16"
    max_pixels: int | None = Field(None, ge=1024, description="larger images are scaled down; none: the model's limit")

    def local(self) -> dict[str, Path]:
        folder = local_folder(self.model)
        return {"model": folder} if folder else {}


class VlmSettings(Vlm, _CaptionerSettings):
    """Captions by a model of transformers' format, Qwen2.5-VL or Qwen3-VL above all; decoding is greedy."""

    kind: Literal["vlm"] = "vlm"
    batch_size: int = operational(8, ge=1)


class Server(Weighed):
    """A server that speaks OpenAI's protocol (vLLM, SGLang, ...): POST URL/chat/completions."""

    model_config = ConfigDict(hide_input_in_errors=True)  # a URL may hold a password by mistake

    url: str = operational(..., description="http://host:8000/v1: where it runs changes no result")
    model: str = Field(min_length=1)
    temperature: float = Field(0.0, ge=0, le=2)
    seed: int = 0
    api_key: Secret | None = operational(None, description="env:NAME or file:PATH, read where the workers run")
    concurrency: int = operational(16, ge=1, description="requests at once, of each worker")
    retries: int = operational(4, ge=0, description="of timeouts, 429, 5xx, and of servers that are not there")
    backoff: float = operational(1.0, ge=0, description="seconds before the first retry; doubled for each one after")
    timeout: float = operational(60.0, gt=0, description="seconds, of one try")
    deadline: float = operational(180.0, gt=0, description="seconds, of one answer with all its tries")
    tolerated: Fraction = operational(
        0.05, description="a shard with more failed answers is not recorded: the server is broken, not the images"
    )

    @field_validator("url")
    @classmethod
    def _plain_url(cls, value: str) -> str:
        url = urlsplit(value)
        if url.scheme not in ("http", "https") or not url.hostname or url.query or url.fragment:
            raise ValueError("an endpoint is written http://host:port/v1")
        if "@" in url.netloc:
            raise ValueError("an endpoint holds no user and password; use api_key")
        return value.rstrip("/")


class EndpointSettings(Server, _CaptionerSettings):
    """Captions by a server that speaks OpenAI's protocol."""

    kind: Literal["endpoint"] = "endpoint"


ScorerSettings = Annotated[ClipSettings | VlmSettings | EndpointSettings, Field(discriminator="kind")]


def local_folder(model: str) -> Path | None:
    """The absolute path of a folder with a model in it; None if this names a model of a hub or a library."""
    folder = Path(model).expanduser()
    is_model = any((folder / config).exists() for config in ("config.json", "open_clip_config.json"))
    return folder.absolute() if is_model else None


def content_sha256(path: Path) -> str:
    """The hash of a model's file, or a digest of those files of a folder that models are loaded from: no README."""
    if path.is_file():
        return file_sha256(path)
    files = (file for file in path.iterdir() if file.suffix in _MODEL_FILES and file.is_file())
    return digest({file.name: file_sha256(file) for file in sorted(files)})


def file_sha256(path: Path) -> str:
    try:
        stat = path.stat()
        return _sha256(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})", remedy="check the scorer's paths") from None


@lru_cache(maxsize=256)  # by size and time of change too, so that a file which was replaced is read again
def _sha256(path: Path, size: int, changed: int) -> str:
    return sha256_of(path)
