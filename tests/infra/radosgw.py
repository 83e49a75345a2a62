"""Run a command beside a real S3 server, Ceph's radosgw: `python -m tests.infra.radosgw -- COMMAND...`

One monitor, one in-memory OSD and one gateway on free loopback ports, without root; all of it lives in a temporary
folder and ends with the command. Ceph is taken from PATH, or from Debian packages unpacked in `.cache/radosgw`.
The command finds the server in PIXNERD_TEST_S3_ENDPOINT, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.
Exit code: the command's; 77 where Ceph cannot be had; 1 where it does not start.
"""

from __future__ import annotations

import ctypes
import http.client
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

TOOLS = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
PACKAGES = ("radosgw", "ceph-mon", "ceph-osd", "ceph-common")
# Of what those depend on, the libraries and the parts of Ceph; disk tools, sudo and such are never called.
WANTED = ("lib", "ceph-", "radosgw", "python3-ceph-argparse", "python3-rados", "python3-prettytable", "python3-wcwidth")
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "radosgw"
PATIENCE = 120.0  # seconds for a daemon to come up
CANNOT_BE_HAD = 77

CONF = """\
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{v2},v1:127.0.0.1:{v1}]
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = {folder}/keyring
run dir = {folder}
pid file = {folder}/$name.pid
admin socket = {folder}/$name.asok
log file = {folder}/$name.log
crash dir = {folder}/crash
public addr = 127.0.0.1
ms bind ipv6 = false
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
mon allow pool size one = true
mon data = {folder}/mon
mon data avail crit = 1
osd crush chooseleaf type = 0
osd objectstore = memstore
memstore device bytes = 8G
osd data = {folder}/osd
osd class load list = *
osd class default list = *
rgw data = {folder}/rgw
{libraries}
[client.admin]
rgw frontends = beast endpoint=127.0.0.1:{port}
"""


class NotToBeHad(Exception):
    pass


def locate() -> tuple[Path | None, dict[str, str]]:
    """The folder that Ceph was unpacked in (None: it is installed) and the environment that its programs need."""
    if all(shutil.which(tool) for tool in TOOLS):
        return None, dict(os.environ)
    prefix = CACHE / "root"
    if not _works(prefix):
        _unpack(prefix)
        if not _works(prefix):
            raise NotToBeHad("the packages do not run on this machine")
    return prefix, _environment(prefix)


def _environment(prefix: Path) -> dict[str, str]:
    libraries = [*prefix.glob("usr/lib/*-linux-gnu"), *prefix.glob("usr/lib/*-linux-gnu/ceph")]
    libraries += prefix.glob("lib/*-linux-gnu")
    return {
        **os.environ,
        "PATH": f"{prefix}/usr/bin:{os.environ.get('PATH', '')}",
        "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
        "PYTHONPATH": f"{prefix}/usr/lib/python3/dist-packages",
    }


def _works(prefix: Path) -> bool:
    env = _environment(prefix)
    return all(
        (found := shutil.which(tool, path=f"{prefix}/usr/bin"))
        and subprocess.run([found, "--version"], env=env, capture_output=True, check=False).returncode == 0
        for tool in TOOLS
        if tool not in ("ceph-authtool", "monmaptool")  # these know no --version
    )


def _unpack(prefix: Path) -> None:
    """Debian's packages, unpacked beside the system, not installed; apt's own state is left alone too."""
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise NotToBeHad("it is not on PATH, and there is no apt-get to fetch it with")
    state = CACHE / "apt"
    try:
        for folder in ("lists/partial", "archives/partial"):
            (state / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NotToBeHad(f"{CACHE} cannot be written ({error.strerror})") from None
    apt = ["apt-get", "-q", "-o", f"Dir::State::lists={state}/lists", "-o", f"Dir::Cache={state}"]
    apt += ["-o", "APT::Sandbox::User="]
    try:
        _output([*apt, "update"], cwd=state)
        plan = _output([*apt, "-s", "install", "--no-install-recommends", *PACKAGES], cwd=state)
        names = [line.split()[1] for line in plan.splitlines() if line.startswith("Inst ")]
        _output([*apt, "download", *(name for name in names if name.startswith(WANTED))], cwd=state)
        with tempfile.TemporaryDirectory(dir=CACHE) as fresh:
            for package in state.glob("*.deb"):
                _output(["dpkg", "-x", str(package), fresh], cwd=state)
            shutil.rmtree(prefix, ignore_errors=True)
            os.rename(fresh, prefix)
            os.mkdir(fresh)  # for the context to remove
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout or "").strip().splitlines()
        raise NotToBeHad(f"{' '.join(error.cmd[:1])} failed: {said[-1] if said else error.returncode}") from None
    finally:
        shutil.rmtree(state, ignore_errors=True)


def _output(command: list[str], *, cwd: Path) -> str:
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout


def _free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in held]
    for server in held:
        server.close()
    return ports


class Ceph:
    """A cluster of one in a folder: `start`, then `endpoint` answers, until `stop`."""

    def __init__(self, folder: Path, prefix: Path | None, env: dict[str, str]) -> None:
        self.folder, self.env = folder, {**env, "CEPH_CONF": str(folder / "ceph.conf")}
        self.v2, self.v1, self.port = _free_ports(3)
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.access_key, self.secret_key = secrets.token_hex(10).upper(), secrets.token_hex(20)
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.fsid = str(uuid.uuid4())
        libraries = ""
        if prefix is not None:
            inside = next(prefix.glob("usr/lib/*-linux-gnu"))
            libraries = f"osd class dir = {inside}/rados-classes\nerasure code dir = {inside}/ceph/erasure-code\n"
            libraries += f"plugin dir = {inside}/ceph\n"
        conf = CONF.format(fsid=self.fsid, v2=self.v2, v1=self.v1, port=self.port, folder=folder, libraries=libraries)
        (folder / "ceph.conf").write_text(conf)
        for name in ("mon", "osd", "rgw", "crash"):
            (folder / name).mkdir()

    def start(self) -> None:
        keyring, monmap = str(self.folder / "keyring"), str(self.folder / "monmap")
        addresses = f"[v2:127.0.0.1:{self.v2},v1:127.0.0.1:{self.v1}]"
        everything = [part for who in ("mon", "osd", "mgr", "mds") for part in ("--cap", who, "allow *")]
        self._run("ceph-authtool", keyring, "-C", "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        self._run("ceph-authtool", keyring, "--gen-key", "-n", "client.admin", *everything)
        self._run(
            "ceph-authtool", keyring, "--gen-key", "-n", "osd.0", "--cap", "mon", "allow *", "--cap", "osd", "allow *"
        )
        self._run("monmaptool", "--create", "--addv", "a", addresses, "--fsid", self.fsid, monmap)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
        self._daemon("ceph-mon", "-i", "a", "-f")

        osd = str(uuid.uuid4())
        self._run("ceph", "osd", "new", osd)  # waits for the monitor
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._daemon("ceph-osd", "-i", "0", "-f")
        self._until("the OSD", lambda: "1 up" in self._run("ceph", "osd", "stat"))

        keys = ("--access-key", self.access_key, "--secret", self.secret_key)
        self._run("radosgw-admin", "user", "create", "--uid", "test", "--display-name", "test", *keys)
        self._daemon("radosgw", "-n", "client.admin", "-f")
        self._until("the gateway", self._answers)

    def stop(self) -> None:
        for daemon in reversed(self.daemons.values()):
            daemon.kill()  # its data is in memory and goes anyway
        for daemon in self.daemons.values():
            daemon.wait()

    def _run(self, tool: str, *arguments: str) -> str:
        command = [self._tool(tool), *arguments]
        done = subprocess.run(
            command, cwd=self.folder, env=self.env, check=False, capture_output=True, text=True, timeout=PATIENCE
        )
        if done.returncode != 0:
            raise RuntimeError(f"{tool} {arguments[0]} failed: {done.stderr.strip()[-2000:]}")
        return done.stdout + done.stderr

    def _daemon(self, tool: str, *arguments: str) -> None:
        with (self.folder / f"{tool}.out").open("wb") as output:
            self.daemons[tool] = subprocess.Popen(
                [self._tool(tool), *arguments], cwd=self.folder, env=self.env, stdout=output, stderr=output,
                stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_die_with_parent,
            )  # fmt: skip

    def _tool(self, name: str) -> str:
        found = shutil.which(name, path=self.env["PATH"])
        assert found is not None, name
        return found

    def _until(self, what: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not ready():
            for tool, daemon in self.daemons.items():
                if daemon.poll() is not None:
                    said = (self.folder / f"{tool}.out").read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"{tool} ended with {daemon.returncode}: {said}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{what} was not ready after {PATIENCE:.0f} s")
            time.sleep(0.2)

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: killing this script leaves nothing running


def main(arguments: list[str]) -> int:
    command = arguments[1:] if arguments[:1] == ["--"] else arguments
    if not command:
        print("usage: python -m tests.infra.radosgw -- COMMAND...", file=sys.stderr)
        return 2
    try:
        prefix, env = locate()
    except NotToBeHad as error:
        print(f"radosgw cannot be had: {error}", file=sys.stderr)
        return CANNOT_BE_HAD
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="radosgw-", ignore_cleanup_errors=True) as folder:
        ceph = Ceph(Path(folder), prefix, env)
        try:
            started = time.monotonic()
            ceph.start()
            print(f"radosgw answers at {ceph.endpoint} after {time.monotonic() - started:.0f} s", file=sys.stderr)
            keys = {"AWS_ACCESS_KEY_ID": ceph.access_key, "AWS_SECRET_ACCESS_KEY": ceph.secret_key}
            env = {**os.environ, **keys, "PIXNERD_TEST_S3_ENDPOINT": ceph.endpoint}
            return subprocess.run(command, env=env, check=False, preexec_fn=_die_with_parent).returncode
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            print(f"radosgw did not start: {error}", file=sys.stderr)
            return 1
        finally:
            ceph.stop()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
