"""Guided sampling as `pixnerd sample` does it, eager and compiled with CUDA graphs. Prompts are encoded beforehand."""

from __future__ import annotations

import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.bench.sides import compare
from tests.gpu import encoders
from tests.gpu.parts import DRAWN, pictures
from tests.gpu.report import Options, Report
from tests.gpu.small import MODEL
from training.encoders.text import TextEncoder
from training.model import PixNerd, preset
from training.model.compiled import compile_network
from training.sampling import Artist, Pictures, SampleSettings


def measure(report: Report, options: Options, *, size: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        encoders.write(folder, tiny=options.tiny, device=options.device)
        net, text = _network(options, size), _encoder(options, folder, size)
    drawn: dict[tuple[str, int], Pictures] = {}
    for how in ("eager", "CUDA graphs"):
        if how != "eager":
            compile_network(net, replay=True)
        settings = _settings(options, compiled=how != "eager")
        for prompts, each in DRAWN:
            artist = Artist(net, text)  # a new one: a compiled one would fill up smaller batches to its largest
            asked = [encoders.CAPTIONS[number] for number in range(prompts) for _ in range(each)]
            seeds = list(range(len(asked)))
            drawn[how, len(asked)] = artist.batch(asked, seeds, settings)
            draw = partial(artist.batch, asked, seeds, settings)
            found = compare({how: draw}, 1 if options.tiny else 7)[how]
            each_ms = [seconds * 1e3 / len(asked) for seconds in found]
            told = f"{statistics.median(each_ms):.1f} ms [{min(each_ms):.1f}, {max(each_ms):.1f}]"
            report.figure(f"{pictures(prompts, each)}, {how}: ms a picture", told)
    report.figure("CUDA graphs against eager: most grey levels between", _between(drawn))


def _config(options: Options, size: int) -> Any:
    changes = MODEL if options.tiny else {"image_size": size}
    return preset("XXL/16").model_copy(update=changes)


def _settings(options: Options, *, compiled: bool) -> SampleSettings:
    return SampleSettings(steps=3 if options.tiny else 25, precision="bf16", compile=compiled)


def _network(options: Options, size: int) -> PixNerd:
    torch.manual_seed(0)
    with torch.device(options.device):
        net = PixNerd(_config(options, size))
    assert net.field is not None
    nn.init.normal_(net.field.out.weight, std=0.02)  # it starts at zero, where all pictures are their noise
    return net.bfloat16()


def _encoder(options: Options, folder: Path, size: int) -> TextEncoder:
    config = _config(options, size)
    return TextEncoder(folder / "text", config.text_tokens, rounded=config.round_text).to(options.device)


def _between(drawn: dict[tuple[str, int], Pictures]) -> str:
    """Of the largest batch: the most, and the share of values that differ at all."""
    count = max(number for _, number in drawn)
    one, other = (drawn[how, count].astype(np.int16) for how in ("eager", "CUDA graphs"))
    apart = np.abs(one - other)
    return f"{apart.max()}; {100 * np.mean(apart > 0):.2f} % of the values differ"
