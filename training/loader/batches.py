"""A rank's share of every global batch, read ahead in threads. A batch's images have one size.

Nothing is computed for a batch between two steps: images, captions, their tokens and random draws are made ahead, in
pinned memory where there is a GPU, and copied to it on a stream of their own. Each sample fills its place in the
batch, so bytes depend neither on the number of threads nor on how far they are ahead.

Shapes: B images, C channels, H height, W width, T tokens, N random words.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from training.diffusion.draws import Draw, words
from training.loader.buckets import Orders
from training.loader.conditions import Conditioner
from training.loader.order import DataSettings, Fetching
from training.loader.reader import Reader, Unreadable
from training.loader.selection import Sample

MOST_THREADS = 16


class Drawing(Protocol):
    def __call__(self, positions: Sequence[int], shape: tuple[int, ...], /, *, bits_BN: Tensor) -> Draw:
        """What is drawn for the samples of these positions, whose images have this shape; the bits go to `bits_BN`."""


@dataclass(frozen=True)
class Batch:
    images_BCHW: Tensor  # uint8, its channels last in memory
    weight_B: Tensor  # 0 for an image that could not be decoded, which is black; else 1
    bits_BN: Tensor
    t_B: Tensor
    kept_BM: Tensor  # patches that token routing keeps; none where it is off
    truncated_B: Tensor  # bool: captions that have more tokens than the network takes
    captions: list[str]  # the dropped ones are empty; numbers where the condition is a label
    positions: np.ndarray
    lengths: np.ndarray  # tokens of each caption; they stay on the CPU
    ids_BT: Tensor | None = None  # of captions; else there are labels
    mask_BT: Tensor | None = None
    labels_B: Tensor | None = None
    unreadable: dict[int, str] = field(default_factory=dict)  # row of the selection -> what is wrong with its image

    def split(self, size: int) -> Iterator[Batch]:
        for start in range(0, len(self.captions), size):
            micro = slice(start, start + size)
            part = self.map(lambda tensor, micro=micro: tensor[micro])  # type: ignore[misc]
            positions, lengths = self.positions[micro], self.lengths[micro]
            yield replace(part, captions=self.captions[micro], positions=positions, lengths=lengths)

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same with each tensor changed."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {name: change(v) for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **changed)


@dataclass
class _Pending:
    """A batch whose places are being filled."""

    batch: Batch
    parts: list[Future[None]]

    def result(self) -> Batch:
        for part in self.parts:
            part.result()
        return self.batch

    def done(self) -> bool:
        return all(part.done() for part in self.parts)


class Batches:
    def __init__(
        self,
        reader: Reader,
        settings: DataSettings,
        *,
        batch: int,
        draw: Drawing,
        condition: Conditioner,
        rank: int = 0,
        ranks: int = 1,
        seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self.reader, self.orders = reader, Orders(reader.selection.rows_SK, seed, settings, batch)
        self.batch, self.rank, self.ranks, self.prefetch = batch, rank, ranks, settings.prefetch
        self.draw, self.condition, self.device = draw, condition, device or torch.device("cpu")
        self.threads = default_threads() if settings.threads is None else settings.threads

    def read(self, position: int) -> Batch:
        return self._start(position, _AtOnce()).result()

    def iterate(self, position: int) -> Generator[Batch]:
        """Endless batches from `position` on; close it to stop the threads."""
        fetching = self._fetching(position)
        mover = _Mover(self.device)
        with ExitStack() as stack:
            planner: Executor = _AtOnce()
            workers: Executor = _AtOnce()
            if self.threads:
                workers = stack.enter_context(ThreadPoolExecutor(self.threads, thread_name_prefix="samples"))
                planner = stack.enter_context(ThreadPoolExecutor(1, "batches", initializer=self._on_device))
            ahead: deque[Future[_Pending]] = deque()
            stack.callback(_cancel, ahead)
            while True:
                while len(ahead) < (self.prefetch if self.threads else 1):
                    ahead.append(planner.submit(self._plan, fetching, position, workers))
                    position += self.batch
                batch = mover.take(ahead.popleft().result())
                if ahead and ahead[0].done() and ahead[0].exception() is None:
                    mover.start(ahead[0].result())
                yield batch

    def _fetching(self, position: int) -> list[Fetching]:
        """What each bucket's order fetches; a shard that another bucket has begun is not fetched again."""
        if len(self.orders.of) == 1:
            starts = [position]
        else:
            starts = [batches * self.batch for batches in self.orders.dealt(position // self.batch)]
        pairs = zip(self.orders.of, starts, strict=True)
        return [Fetching(order, self.rank, self.ranks, start) for order, start in pairs]

    def _plan(self, fetching: list[Fetching], position: int, workers: Executor) -> _Pending:
        bucket, before = self.orders.find(position)
        for shard in fetching[bucket].until(before + self.batch):
            self.reader.tars.begin(self.reader.selection.tars[shard])
        return self._start(position, workers)

    def _start(self, position: int, workers: Executor) -> _Pending:
        positions = np.arange(position + self.rank, position + self.batch, self.ranks)
        bucket, before = self.orders.find(position)
        rows = [self.orders.of[bucket].row(before + int(p)) for p in positions - position]
        samples = [self.reader.selection.sample(row) for row in rows]
        batch = self._empty(positions, samples)
        size = -(-len(rows) // max(1, self.threads))
        parts = [slice(start, start + size) for start in range(0, len(rows), size)]
        return _Pending(batch, [workers.submit(self._fill, batch, rows, samples, part) for part in parts])

    def _empty(self, positions: np.ndarray, samples: list[Sample]) -> Batch:
        height, width, count = samples[0].height, samples[0].width, len(samples)

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, pin_memory=self.device.type == "cuda")

        bits_BN = empty(count, words((3, height, width)), dtype=torch.int16)
        kept = self.draw([], (3, height, width), bits_BN=bits_BN[:0]).kept_BM.shape[1]
        shapes = self.condition.shapes.items()
        condition: dict[str, Any] = {name: empty(count, *shape, dtype=torch.int64) for name, shape in shapes}
        return Batch(
            images_BCHW=empty(count, height, width, 3, dtype=torch.uint8).permute(0, 3, 1, 2),
            weight_B=empty(count, dtype=torch.float32).fill_(1),
            bits_BN=bits_BN,
            t_B=empty(count, dtype=torch.float32),
            kept_BM=empty(count, kept, dtype=torch.int64),
            truncated_B=empty(count, dtype=torch.bool).fill_(False),
            captions=[""] * count,
            positions=positions,
            lengths=np.zeros(count, dtype=np.int64),
            **condition,
        )

    def _fill(self, batch: Batch, rows: list[int], samples: list[Sample], part: slice) -> None:
        """Fill some of a batch's places."""
        shape = tuple(batch.images_BCHW.shape[1:])
        drawn = self.draw(batch.positions[part].tolist(), shape, bits_BN=batch.bits_BN[part])
        batch.t_B[part], batch.kept_BM[part] = drawn.t_B, drawn.kept_BM
        images_BHWC = batch.images_BCHW.permute(0, 2, 3, 1).numpy()
        values, batch.captions[part] = self.condition(rows[part], drawn.drop_B, drawn.choice_B)
        for name, value in values.items():
            getattr(batch, name)[part] = value
        if batch.mask_BT is not None:
            batch.lengths[part] = batch.mask_BT[part].sum(1).numpy()
        for place in range(len(rows))[part]:
            try:
                self.reader.image(samples[place], images_BHWC[place])
            except Unreadable as error:
                images_BHWC[place], batch.weight_B[place] = 0, 0
                batch.unreadable[rows[place]] = str(error)

    def _on_device(self) -> None:
        """Threads begin on the first GPU, where pinned memory would cost every rank of the machine a context."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)


def default_threads() -> int:
    """This rank's share of the machine's cores, but for one, on which its trainer runs."""
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MOST_THREADS, len(os.sched_getaffinity(0)) // beside - 1))


class _Mover:
    """Copies batches to a GPU on a stream of its own, where possible before the batch is asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._moved: dict[int, tuple[Batch, torch.cuda.Event]] = {}

    def start(self, pending: _Pending) -> None:
        if self.stream is not None and pending.done():
            self._move(pending)

    def take(self, pending: _Pending) -> Batch:
        """The batch, on the device; the stream of the caller waits for its copy, and the CPU does not."""
        if self.stream is None:
            return pending.result()
        if id(pending) not in self._moved:
            self._move(pending)
        batch, copied = self._moved.pop(id(pending))
        current = torch.cuda.current_stream(self.device)
        current.wait_event(copied)

        def used(tensor: Tensor) -> Tensor:
            tensor.record_stream(current)  # else its memory could be given to the next batch while a step reads it
            return tensor

        return batch.map(used)

    def _move(self, pending: _Pending) -> None:
        batch = pending.result()
        with torch.cuda.stream(self.stream):
            moved = batch.map(lambda tensor: tensor.to(self.device, non_blocking=True))
            event = torch.cuda.Event()
            event.record()
        self._moved[id(pending)] = (moved, event)


class _AtOnce(Executor):
    """Does the work where it is submitted: without threads, and for a single batch."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def _cancel(ahead: deque[Future[_Pending]]) -> None:
    """Take back what no thread has begun, so that closing does not wait for whole batches."""
    for future in ahead:
        if not future.cancel() and future.done() and future.exception() is None:
            for part in future.result().parts:
                part.cancel()
