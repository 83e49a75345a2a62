"""Checks that the head of a Ray cluster answers, before Ray tries to join: Ray would take minutes to give up.

An address is what `ray start --head` prints: a host and the port of the head's control service, 6379 by default. The
check is one gRPC call without a body, which every version of that service answers.
"""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path
from urllib.parse import urlsplit

from infra.errors import ClusterError, PixnerdError, SettingsError

_METHOD = "/ray.rpc.NodeInfoGcsService/GetClusterId"
_PATIENCE = 10.0  # seconds in which a head must answer; one that has just been started needs some
_PAUSE = 0.5


def check_head(address: str) -> None:
    """Raise an error if the address is wrong or no head of a cluster answers there."""
    if address == "auto":  # Ray then looks for a cluster on this machine
        return
    _check_form(address)
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return  # only Ray knows the certificates
    status, text = _ask(address)
    if status == "UNAUTHENTICATED" and _mode() in ("", "disabled", "token"):  # only Ray knows other modes' tokens
        raise _refused(address)
    if status in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
        cause = "it says nothing" if status == "DEADLINE_EXCEEDED" else text.rpartition("UNKNOWN: ")[2]
        raise ClusterError(
            f"no head of a Ray cluster answers at {address} ({cause})",
            remedy="give the host and port that `ray start --head` told, and see that it runs: `ray status`",
        )


def own_token() -> None:
    """Make a token for the cluster that this process is about to start, unless there is one.

    Otherwise Ray would write a token into the user's home, where it would stay: all heads started later on this machine
    would ask for it, and drivers that name such a head by its address do not send it.
    """
    if _token() is None:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _check_form(address: str) -> None:
    scheme, separator, _ = address.partition("://")
    parts = urlsplit(address if separator else f"//{address}")
    example = f"{parts.hostname or 'HOST'}:6379"
    if separator and scheme in ("http", "https"):
        raise SettingsError(
            f"an address that begins with {scheme}:// is that of Ray's dashboard, which takes jobs, not drivers",
            remedy=f"write {example}, with the port that `ray start --head` told, on a machine of the cluster; "
            "or hand this command to `ray job submit`, without an address",
        )
    if separator and scheme == "ray":
        raise SettingsError(
            "an address that begins with ray:// is that of Ray's client server, through which nothing can be trained",
            remedy=f"write {example}, with the port that `ray start --head` told, on a machine of the cluster",
        )
    try:
        complete = bool(parts.hostname and parts.port)
    except ValueError:
        complete = False
    if separator or not complete or "@" in address or "/" in address:
        raise SettingsError(
            "the address of a Ray cluster is a host and a port", remedy="write HOST:6379, as `ray start --head` told it"
        )


def _ask(address: str) -> tuple[str, str]:
    """Call the head; the name of gRPC's status, and its text."""
    import grpc

    token = _token() if _mode() == "token" else None
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    deadline = time.monotonic() + _PATIENCE
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        call = channel.unary_unary(_METHOD)
        while True:
            try:
                call(b"", timeout=max(_PAUSE, deadline - time.monotonic()), metadata=metadata)
                return "OK", ""
            except grpc.RpcError as error:
                status, text = error.code().name, str(error.details())
            if status != "UNAVAILABLE" or time.monotonic() >= deadline:
                return status, text
            time.sleep(_PAUSE)


def _refused(address: str) -> PixnerdError:
    if _mode() == "token":
        return ClusterError(
            f"the Ray cluster at {address} refuses the token of {_token_place()}",
            remedy="set RAY_AUTH_TOKEN to what `ray get-auth-token` prints on the cluster's head",
        )
    return ClusterError(
        f"the Ray cluster at {address} asks for a token, and none was sent",
        remedy=f"if {_token_place()} is the cluster's, as on the machine that started it, set RAY_AUTH_MODE=token; "
        "else set RAY_AUTH_TOKEN to what `ray get-auth-token` prints on its head as well",
    )


def _mode() -> str:
    return os.environ.get("RAY_AUTH_MODE", "").lower()


def _token_place() -> str:
    """Where Ray finds its token: it looks at these in this order."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    return os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"


def _token() -> str | None:
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    try:
        return Path(_token_place()).expanduser().read_text(encoding="utf-8").strip() or None
    except (OSError, ValueError):
        return None
