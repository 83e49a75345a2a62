"""When and where: the command, and the workflow that it runs.

A command that is stopped while Python still reads its modules has nothing to end, and says so in the same words as
later, when `infra.guard` takes over. Who imports this package for other ends is left alone.
"""

import os
import signal
import sys
from types import FrameType


def _stop(number: int, frame: FrameType | None) -> None:
    os.write(2, b"stopped; the same command goes on from here\n")
    os._exit(128 + number)


if sys.argv[0] == "-m" or os.path.basename(sys.argv[0]) == "pixnerd":  # as `python -m orchestration.cli`, or installed
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
