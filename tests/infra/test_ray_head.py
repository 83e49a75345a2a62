"""Who answers at a cluster's address, and what is said of it: within seconds, by a real head and by none."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra import ray_head
from infra.cluster import ClusterSettings, connect
from infra.errors import ClusterError, SettingsError
from infra.ray_head import check_head

SECRET = "keep-this-to-yourself"
TOKENS = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("address", "says", "instead"),
    [
        ("http://10.0.0.7:8265", "dashboard", "write 10.0.0.7:6379"),
        (f"https://me:{SECRET}@ray_head.example:8265/", "dashboard", "write ray_head.example:6379"),
        ("ray://head:10001", "client server", "write head:6379"),
        ("head", "a host and a port", "HOST:6379"),
        ("head:port", "a host and a port", "HOST:6379"),
        ("head:66379", "a host and a port", "HOST:6379"),
        (":6379", "a host and a port", "HOST:6379"),
        (f"me:{SECRET}@head:6379", "a host and a port", "HOST:6379"),
        ("tcp://head:6379", "a host and a port", "HOST:6379"),
    ],
)
def test_other_addresses_have_words_of_their_own(address: str, says: str, instead: str):
    with pytest.raises(SettingsError) as caught:
        connect_elsewhere(address)
    assert says in caught.value.message
    assert instead in caught.value.remedy
    assert SECRET not in str(caught.value)


def connect_elsewhere(address: str) -> None:
    """As the command does it, but where no cluster has been joined yet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray.is_initialized", lambda: False)
        connect(ClusterSettings(address=address))


def test_a_host_where_nobody_listens_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ray_head, "_PATIENCE", 1.0)
    with pytest.raises(ClusterError, match=r"no head .* 127\.0\.0\.1:1 \(.*refused\)"):
        connect_elsewhere("127.0.0.1:1")


def test_a_host_without_a_name_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ray_head, "_PATIENCE", 1.0)
    with pytest.raises(ClusterError, match=r"no head of a Ray cluster answers at nowhere\.invalid:6379"):
        connect_elsewhere("nowhere.invalid:6379")


def test_a_host_that_says_nothing_is_told(silent: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ray_head, "_PATIENCE", 1.0)
    with pytest.raises(ClusterError, match="it says nothing"):
        connect_elsewhere(silent)


def test_it_is_told_well_within_twenty_seconds():
    assert ray_head._PATIENCE <= 15


def test_a_real_head_lets_in_who_brings_its_token(ray_cluster: str):
    check_head(ray_cluster)


def test_a_real_head_without_its_token_is_told_with_the_way_in(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    token = ray_head._token()
    assert token is not None
    for name in TOKENS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ClusterError, match="asks for a token") as caught:
        connect_elsewhere(ray_cluster)
    assert "~/.ray/auth_token" in caught.value.remedy and "RAY_AUTH_MODE=token" in caught.value.remedy
    saved = tmp_path / ".ray" / "auth_token"
    saved.parent.mkdir()
    saved.write_text("f" * 64)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(ClusterError, match=r"refuses the token of ~/\.ray/auth_token") as caught:
        connect_elsewhere(ray_cluster)
    saved.write_text(token)
    check_head(ray_cluster)
    assert token not in str(caught.value)


LOCAL = """
import sys
from pathlib import Path
from infra.cluster import ClusterSettings, connect, disconnect

connect(ClusterSettings(cpus=1, object_store_mb=80))
disconnect()
print([str(path) for path in Path.home().rglob("*")])
"""


@pytest.mark.slow
def test_a_local_run_leaves_no_token_behind_that_later_clusters_would_ask_for(tmp_path: Path):
    kept = {name: value for name, value in os.environ.items() if name not in TOKENS}
    done = subprocess.run(
        [sys.executable, "-c", LOCAL], env={**kept, "HOME": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
