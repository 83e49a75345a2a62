"""The log of an attempt at a stage, in the store: its progress, warnings, and the traceback of its failure."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from infra.errors import PixnerdError
from infra.store import Store
from orchestration.lease import now

if TYPE_CHECKING:
    from pipelines.stages.base import Progress

PROGRESS_SECONDS = 10.0  # between lines that tell how far a stage is
SEND_SECONDS = 30.0  # between the times when the log is put to the store
LONGEST = 1 << 18  # characters that are kept: the first and the newest ones


class StageLog:
    """Lines that are kept here, and put to the store as one object now and then, and at the end."""

    def __init__(self, store: Store, key: str) -> None:
        self._store, self._key = store, key
        self._lock = threading.Lock()
        self._text, self._sent, self._last_sent = "", "", -SEND_SECONDS
        self._unsaid, self._last_progress = "", -PROGRESS_SECONDS

    def line(self, text: str) -> None:
        with self._lock:
            self._add(text)

    def progress(self, so_far: Progress) -> None:
        with self._lock:
            self._unsaid, moment = so_far.text, time.monotonic()
            if moment - self._last_progress >= PROGRESS_SECONDS:
                self._last_progress = moment
                self._add("")

    def failure(self, error: BaseException) -> None:
        self.line("".join(traceback.format_exception(error)).rstrip())

    def send(self) -> None:
        """Put what is new to the store, if that was not done just now. A log that cannot be put stops nothing."""
        if time.monotonic() - self._last_sent >= SEND_SECONDS:
            self._send()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While the body runs, the warnings that the user is shown are among the lines. At the end all are sent."""
        shown = logging.lastResort  # what prints warnings where nobody has set up logging, as in the command
        logging.lastResort = _Tee(self, shown)
        try:
            yield
        finally:
            logging.lastResort = shown
            self.line("")
            self._send()

    def _send(self) -> None:
        with self._lock:
            text = self._text
        if text != self._sent:
            with suppress(PixnerdError):
                self._store.put(self._key, text.encode(errors="replace"))
                self._sent, self._last_sent = text, time.monotonic()

    def _add(self, text: str) -> None:
        """Add the newest progress that was not told yet, and this text if there is one. The caller holds the lock."""
        for each in filter(None, (self._unsaid, text)):
            self._text += f"{now()}  {each}\n"
        self._unsaid = ""
        if len(self._text) > LONGEST:
            first, newest = self._text[: LONGEST // 2], self._text[-LONGEST // 4 :]
            self._text = "\n".join([first.rpartition("\n")[0], "...", newest.partition("\n")[2]])


class _Tee(logging.Handler):
    def __init__(self, log: StageLog, shown: logging.Handler | None) -> None:
        super().__init__(logging.WARNING)
        self._log, self._shown = log, shown

    def emit(self, record: logging.LogRecord) -> None:
        self._log.line(f"{record.levelname.lower()}: {record.getMessage()}")
        if self._shown is not None:
            self._shown.handle(record)
