"""The `pixnerd` command, and the workflow that it runs.

Importing the commands takes seconds. Until `infra.guard` handles signals, a stopped command has nothing to clean up: it
ends at once, with the same line. The handlers are installed for the command only, not for others who import this.
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
