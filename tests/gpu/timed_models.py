"""`bench_model` as rows of the table: ours and the published network written down plainly, eager and compiled."""

from __future__ import annotations

import gc
import statistics

import torch

from tests.bench import bench_model
from tests.gpu.parts import BARE_BATCH, COMPARED, SIDES, pictures
from tests.gpu.report import Options, Report
from tests.gpu.small import MODEL
from training.model import preset

ROUNDS = 7


def train(report: Report, options: Options, *, size: int) -> None:
    """Each side in a bench of its own: four optimisers and their networks side by side would fill the memory."""
    batch = options.batch or (2 if options.tiny else BARE_BATCH[size])
    for side in SIDES:
        try:
            [times] = _bench(options, size, [side]).train(batch).values()
            rates = [batch / seconds for seconds in times]
            told = f"{statistics.median(rates):.1f} [{min(rates):.1f}, {max(rates):.1f}], batch {batch}"
        except torch.OutOfMemoryError:  # of one side; the others may fit
            told = f"out of memory, batch {batch}"
        report.figure(f"training step, {side}: images a second", told)
        _free()


def sampling(report: Report, options: Options, *, size: int) -> None:
    bench = _bench(options, size, list(SIDES))
    prompts, each = COMPARED
    for side, times in bench.sample(prompts, each).items():
        each_ms = [seconds * 1e3 / (prompts * each) for seconds in times]
        told = f"{statistics.median(each_ms):.1f} ms [{min(each_ms):.1f}, {max(each_ms):.1f}]"
        report.figure(f"{pictures(prompts, each)}, {side}: ms a picture", told)


def _bench(options: Options, size: int, sides: list[str]) -> bench_model.Bench:
    changes = MODEL if options.tiny else {"image_size": size}
    config = preset("XXL/16").model_copy(update=changes)
    makes = {"plain": bench_model.plain_make(), "ours": bench_model.our_make()}
    rounds = 1 if options.tiny else ROUNDS
    return bench_model.Bench(config, options.device, torch.bfloat16, rounds, makes, sides)


def _free() -> None:
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
