"""An empty store, and an empty folder for a corpus, for tests that make up their own."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.store import Store, open_store
from tests.data_prep.web import Web


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "corpus").mkdir()
    return tmp_path / "corpus"


@pytest.fixture
def web() -> Iterator[Web]:
    with Web() as web:
        yield web
    gc.collect()  # an unclosed connection warns here
