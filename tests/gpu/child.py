"""One part, in a process of its own: neither a crash nor a full memory takes another part along."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from pathlib import Path

from tests.gpu.parts import PARTS, Part
from tests.gpu.report import NotHere, Options, Report, today


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--figures", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--batch", type=int)
    given = parser.parse_args(arguments)
    return run(PARTS[given.part], Options(given.device, given.tiny, given.batch), given.figures)


def run(part: Part, options: Options, figures: Path) -> int:
    report = Report(part, figures)
    try:
        report.where = machine(options)
        module, _, function = part.function.partition(":")
        getattr(importlib.import_module(f"tests.gpu.{module}"), function)(report, options, **part.given)
    except NotHere as error:
        report.line({"not_here": str(error)})
        return 1
    except Exception as error:  # noqa: BLE001 - whatever it is, the table names it and the other parts go on
        traceback.print_exc()
        report.line({"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"})
        return 1
    return 0


def machine(options: Options) -> str:
    """The day, the GPU and the version of PyTorch, which stand in every row."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if options.tiny:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # a compiler takes minutes; that it works, other tests say
    import torch

    if not options.gpu:
        return f"{today()}, CPU, torch {torch.__version__}"
    if not torch.cuda.is_available():
        raise NotHere("there is no GPU here")
    return f"{today()}, {torch.cuda.get_device_name()}, torch {torch.__version__}"


if __name__ == "__main__":
    sys.exit(main())
