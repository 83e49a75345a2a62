"""Processes forked from one that has imported everything: a rank or a driver then starts in no time."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import partial

import torch.distributed as dist

from infra.errors import PixnerdError


def import_all() -> None:
    """What every child would import and load again, in seconds; to be called before the first is forked."""
    from training.engine import import_deepspeed

    import_deepspeed()
    import torch._dynamo
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
    from deepspeed.runtime.zero.muon import muon_optimizer
    from transformers import AutoModel, Dinov2Model, Qwen2TokenizerFast, Qwen3Model

    assert all((torch._dynamo, muon_optimizer, AutoModel, Dinov2Model, Qwen2TokenizerFast, Qwen3Model))
    ShareMemCommBuilder().load(verbose=False)


def forked(work: Callable[[], int]) -> int:
    """The number of a child process that does the work and ends with what it gives."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        random.seed(os.getpid())
        code = work()
    except PixnerdError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    except Exception:  # noqa: BLE001 - whatever it is, the child must not go on as its parent
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def together(ranks: int, work: Callable[[int], None]) -> list[int]:
    """`work(rank)` on so many ranks; where one ends with an error the others, who would wait for it, are killed."""
    with tempfile.TemporaryDirectory() as folder:

        def rank(number: int) -> int:
            os.environ["LOCAL_RANK"] = str(number)
            dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=number, world_size=ranks)
            work(number)
            return 0

        pids = [forked(partial(rank, number)) for number in range(ranks)]
        codes = []
        for _ in pids:
            pid, status = os.wait()
            codes.append(os.waitstatus_to_exitcode(status))
            for other in set(pids) - {pid} if codes[-1] else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(other, signal.SIGKILL)
    return codes
