"""The tars that hold the images: each is fetched once, checked against its hash, and then read at offsets."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from infra.records import fetch_named
from infra.store import Store


class Tars:
    def __init__(self, store: Store, folder: Path) -> None:
        self.store, self.folder = store, folder
        self._files: dict[str, BinaryIO] = {}

    def read(self, key: str, offset: int, length: int) -> bytes:
        file = self._opened(key)
        file.seek(offset)
        return file.read(length)

    def _opened(self, key: str) -> BinaryIO:
        if key not in self._files:
            path = self.folder / key.replace("/", "_")
            if not path.exists():
                fetch_named(self.store, key, path)
            self._files[key] = path.open("rb")
        return self._files[key]

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()
