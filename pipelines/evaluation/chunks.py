"""Work on pictures, chunk by chunk, by a pool of Ray actors: drawing and judging both are.

    evaluations/<stage>/drawn/00008.json                       Chunk, written last
    evaluations/<stage>/pictures/pictures-00008-<sha256>.tar   what was made of it; of judging, a table of verdicts

What is in a chunk depends on settings that count, so the bytes depend neither on how many actors there are nor on which
of them dies. A chunk whose record is there is not made again. What fails twice is counted with its cause.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from infra.actors import Actors, Needs, fitted
from infra.causes import exhausted, first_line
from infra.errors import ClusterError, EvaluationError, PixnerdError
from infra.layout import Place
from infra.pool import results
from infra.records import DataObject, Record, put_data, read_record, recorded
from infra.store import Store

Show = Callable[[str, int, int], None]  # a text, how much is done, of how much
Item = TypeVar("Item")


class Chunk(Record):
    """What was made of a chunk."""

    data: dict[str, DataObject]  # name of what was made -> where it lies; empty if all of it failed
    failed: dict[str, str]  # picture that is missing, <prompt>-<image> -> the cause
    device: str  # what it was made on


class Made(NamedTuple):
    files: dict[str, bytes]  # a name with its suffix, such as `pictures.tar` -> what is in it
    failed: dict[str, str]


class Maker(ABC, Generic[Item]):
    """Makes something of chunks. It is sent to the actors, each of which calls `load` once."""

    noun: ClassVar[str]  # of what is made, for the line of progress

    @abstractmethod
    def load(self, device: str) -> None: ...

    @abstractmethod
    def make(self, item: Item) -> Made: ...

    @abstractmethod
    def pictures(self, item: Item) -> list[str]:
        """The pictures that are counted as missing if the chunk fails: <prompt>-<image>."""


class Shelf(NamedTuple):
    """Where the records of chunks lie; what was made of them lies in the one folder that they may name."""

    store: Store
    place: Place
    stage: str

    def key(self, number: int) -> str:
        return self.place.at(stage=self.stage, first=number)

    @property
    def folder(self) -> str:
        [folder] = self.place.names
        return folder.at(stage=self.stage)

    def put(self, number: int, made: Made, device: str) -> Chunk:
        data = {}
        for name, content in made.files.items():
            stem, _, suffix = name.rpartition(".")
            data[stem] = put_data(self.store, self.folder, f"{stem}-{number:05d}.{suffix}", content)
        return recorded(self.store, self.key(number), Chunk(data=data, failed=made.failed, device=device))


def make(shelf: Shelf, maker: Maker[Item], items: Mapping[int, Item], needs: Needs, show: Show) -> list[Chunk]:
    """The chunks of all items, in their order; Ray must be up if one is missing."""
    there = {shelf.place.parts(key)["first"] for key in shelf.place.keys(shelf.store, stage=shelf.stage)}
    chunks = {n: read_record(shelf.store, shelf.key(n), Chunk) for n in items if n in there}
    todo = [number for number in items if number not in chunks]
    if todo:
        for number, chunk in results(_Making(shelf, maker, items, todo, fitted(needs))):
            chunks[number] = chunk
            show(f"{len(chunks)} of {len(items)} {maker.noun}", len(chunks), len(items))
    done = [chunks[number] for number in items]
    if done and not any(chunk.data for chunk in done):
        cause = next(iter(done[0].failed.values()), "no cause is known")
        raise EvaluationError(f"all {maker.noun} failed: {cause}", remedy="mend the cause, and run it as a new stage")
    return done


class _Making(Actors[int, Chunk]):
    def __init__(
        self, shelf: Shelf, maker: Maker[Item], items: Mapping[int, Item], todo: list[int], needs: Needs
    ) -> None:
        super().__init__(maker.noun, todo, needs, _Actor, shelf, maker, device_of(needs))
        self._shelf, self._maker, self._items, self._needs = shelf, maker, items, needs

    def arguments(self, piece: int) -> tuple[Any, ...]:
        return piece, self._items[piece]

    def failed(self, piece: int, error: Exception, again: bool) -> Chunk | None:
        """An error of ours would be met with every other chunk, too; but for a chunk that kills its worker."""
        ours = isinstance(error, PixnerdError) and not isinstance(error, ClusterError)
        if ours or exhausted(error) is not None:
            raise error from None
        if not again:
            return None
        self.replace(piece)
        told = error.message if isinstance(error, PixnerdError) else first_line(error)
        missing = dict.fromkeys(self._maker.pictures(self._items[piece]), told)
        chunk = Chunk(data={}, failed=missing, device=device_of(self._needs))
        return recorded(self._shelf.store, self._shelf.key(piece), chunk)


class _Actor:
    """An actor with its maker, which loads with the first chunk, so that an error reaches the caller."""

    def __init__(self, shelf: Shelf, maker: Maker[Any], device: str) -> None:
        self.shelf, self.maker, self.device, self.loaded = shelf, maker, device, False

    def do(self, number: int, item: Any) -> Chunk:
        shelf = self.shelf
        if shelf.store.exists(shelf.key(number)):  # another driver was faster
            return read_record(shelf.store, shelf.key(number), Chunk)
        if not self.loaded:
            self.maker.load(self.device)
            self.loaded = True
        return shelf.put(number, self.maker.make(item), _named(self.device))


def device_of(needs: Needs) -> str:
    return "cuda" if needs.gpus else "cpu"


def _named(device: str) -> str:
    if device == "cpu":
        return device
    import torch

    return f"cuda ({torch.cuda.get_device_name()})"
