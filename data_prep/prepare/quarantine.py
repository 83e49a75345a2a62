"""Decoding in a child process, for shards whose worker died: a file that kills its decoder kills only the child.

The parent keeps the shard and sends one image at a time. An image that twice kills the child, or keeps it past the
deadline, is rejected as `decoder_crash`; the rest of the shard is made as usual.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe

from data_prep.prepare.plan import PrepareSettings
from data_prep.prepare.shard import Decoder, Outcome, make_picture, outcomes_of
from data_prep.rejections import Cause, Rejection
from data_prep.sources import RawItem

ATTEMPTS = 2
DEADLINE = 120.0  # seconds for one image: far more than any image below the pixel limit takes


def outcomes(
    items: Iterable[RawItem], settings: PrepareSettings, decoder: Decoder
) -> Iterator[tuple[RawItem, Outcome]]:
    child = _Child(settings, decoder)
    try:
        yield from outcomes_of(items, child.outcome)
    finally:
        child.stop()


class _Child:
    def __init__(self, settings: PrepareSettings, decoder: Decoder) -> None:
        from ray import cloudpickle

        self._setup = cloudpickle.dumps((settings, decoder))
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def outcome(self, image: bytes) -> Outcome:
        end = ""
        for _ in range(ATTEMPTS):
            try:
                return self._ask(image)
            except TimeoutError:
                end = f"no answer within {DEADLINE:.0f} s"
            except (EOFError, OSError):
                assert self._process is not None
                end = f"the decoder's process ended with {self._process.wait()}"
            self.stop()
        return Rejection(Cause.DECODER_CRASH, end)

    def _ask(self, image: bytes) -> Outcome:
        connection = self._connection or self._start()
        connection.send_bytes(image)
        if not connection.poll(DEADLINE):
            raise TimeoutError
        outcome: Outcome = connection.recv()
        return outcome

    def _start(self) -> Connection:
        ours, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "data_prep.prepare.quarantine", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        self._connection = ours
        ours.send_bytes(self._setup)
        return ours

    def stop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _serve(connection: Connection) -> None:
    import torch
    from ray import cloudpickle

    torch.set_num_threads(1)
    settings, decoder = cloudpickle.loads(connection.recv_bytes())
    with suppress(EOFError):  # the parent has closed the pipe, or died
        while True:
            connection.send(make_picture(connection.recv_bytes(), settings, decoder))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
