"""An empty store, and an empty folder for a corpus, for tests that make up their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.store import Store, open_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "corpus").mkdir()
    return tmp_path / "corpus"
