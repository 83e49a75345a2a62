"""Object storage behind a URL: `file:///folder` (or a plain path) and `s3://bucket/prefix`, with one behaviour.

What the rest of pixnerd builds on, and what `probe` checks once at start-up:

- an object appears whole or not at all, whenever the writer is killed;
- `create` is create-if-absent: of any number of writers exactly one is told True. On S3 an object of
  `multipart_threshold` or more is exact only where the server honours the condition on CompleteMultipartUpload; older
  radosgw ignores it there, so existence is also checked just before. What is left is a race between two writers of
  the same large object, which is harmless because data objects carry their sha256 in their names. Records are small.
- `list` is sorted by the UTF-8 bytes of the keys, also for files, and never shows what lies under `.tmp/`.

A writer killed in the middle of a multipart upload leaves parts that no reader sees: give the bucket a lifecycle rule
that aborts incomplete uploads.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import logging
import math
import os
import shutil
import stat
import tempfile
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import unquote, urlsplit

from pydantic import ConfigDict, field_validator, model_validator

from infra.config import Secret, Settings, operational
from infra.errors import NotFound, SettingsError, StoreError, StoreUnreachable, UnsafeStore
from infra.outage import ride_out

T = TypeVar("T")
log = logging.getLogger(__name__)

SCRATCH = ".tmp"  # unfinished files and probes: never listed
STALE_SECONDS = 24 * 3600.0  # a scratch file this old belongs to a process that was killed
COPY_BYTES = 1 << 20
MIB = 1 << 20
MAX_PARTS = 10_000  # of one multipart upload
PATIENCE = 75.0  # seconds that an outage may last; a claim on work outlives it (infra/claim.py)
FIRST_PAUSE = 0.2
IMPATIENCE = 2.0  # for whoever waits at a prompt
# What a network filesystem answers while its server is away, and after it has come back.
AWAY = {
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.ECONNABORTED),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
}


@dataclass(frozen=True)
class Entry:
    key: str
    size: int
    modified: float = field(default=math.inf, compare=False)  # seconds since the epoch; where unknown it counts as new
    tag: str = field(default="", compare=False)  # another one where the object was written anew; empty: nobody tells


class StoreSettings(Settings):
    """How an s3:// store is reached. What is not set here comes from the standard AWS_* variables and files."""

    model_config = ConfigDict(hide_input_in_errors=True)  # an endpoint or a key may hold a password by mistake

    endpoint_url: str | None = operational(None)
    region: str | None = operational(None)
    access_key: Secret | None = operational(None)
    secret_key: Secret | None = operational(None)
    path_style: bool | None = operational(None)  # None: yes where an endpoint is named, no on AWS itself
    patience: float = operational(PATIENCE, ge=0)  # seconds that an outage may last
    timeout: float = operational(60.0, gt=0)  # seconds without a byte
    backoff: float = operational(FIRST_PAUSE, ge=0)  # seconds, the longest that the first pause can be
    connections: int = operational(8, ge=1)  # parts of one large object in flight
    multipart_threshold: int = operational(64 * MIB, ge=1)
    part_size: int = operational(16 * MIB, ge=5 * MIB)  # S3 takes no smaller ones, except for the last
    page_size: int = operational(1000, ge=1, le=1000)

    @field_validator("endpoint_url")
    @classmethod
    def _plain_endpoint(cls, value: str | None) -> str | None:
        if value is not None:
            parts = urlsplit(value)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("an endpoint is written http://host:port or https://host")
            if "@" in parts.netloc:
                raise ValueError("an endpoint holds no user and password; use access_key and secret_key")
        return value

    @model_validator(mode="after")
    def _both_keys(self) -> StoreSettings:
        if (self.access_key is None) != (self.secret_key is None):
            raise ValueError("access_key and secret_key go together: set both or neither")
        return self


def check_key(key: str) -> str:
    """The key itself, or StoreError: keys also come out of records and listings, which others may have written."""
    parts = key.split("/")
    if any(part in ("", ".", "..") for part in parts):
        wrong = "is not relative, or has an empty, `.` or `..` part"
    elif any(ord(letter) < 32 or 0x7F <= ord(letter) < 0xA0 or 0xD800 <= ord(letter) < 0xE000 for letter in key):
        wrong = "has control characters, or is not Unicode"
    elif any(len(part.encode()) > 255 for part in parts):
        wrong = "has a part of more than 255 bytes"
    else:
        return key
    raise StoreError(f"the key {key[:200]!a} {wrong}", remedy="rename the object; keys look like a/b/c.tar")


class Store(ABC):
    """Objects by key. Stores pickle: a task in another process opens its own connection."""

    url: str

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    @abstractmethod
    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes [start, end), clipped to the object; NotFound if there is none."""

    def get_tagged(self, key: str, start: int = 0, end: int | None = None) -> tuple[bytes, str]:
        """The same, with the `Entry.tag` of what was read."""
        return self.get(key, start, end), ""

    @abstractmethod
    def put(self, key: str, data: bytes | Path) -> None:
        """Write the object, over whatever was there."""

    @abstractmethod
    def create(self, key: str, data: bytes | Path) -> bool:
        """Write the object unless there is one; False if somebody was first."""

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """The objects whose keys start with `prefix`, sorted by key, read page by page."""
        for entry in self.list_unchecked(prefix):
            check_key(entry.key)
            yield entry

    @abstractmethod
    def list_unchecked(self, prefix: str = "") -> Iterator[Entry]:
        """The same, with keys that nobody has checked: of what others have put there."""

    @abstractmethod
    def size(self, key: str) -> int | None:
        """Bytes of the object, None if there is none."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; none is fine."""

    @abstractmethod
    def download(self, key: str, path: Path) -> None:
        """Copy the object to a file, which appears whole or not at all."""

    @abstractmethod
    def now(self) -> float:
        """Seconds since the epoch by the clock that `Entry.modified` is of, which need not be this machine's."""

    def exists(self, key: str) -> bool:
        return self.size(key) is not None

    def spool(self) -> BinaryIO:
        """A file to write a large object into before it is put: it has no name, so nothing of it outlives the process.

        `put` and `create` take it by its `spool_path`. On the store's own disk it becomes the object, without a copy:
        nothing more may be written to it then.
        """
        return tempfile.TemporaryFile()

    def probe(self) -> None:
        """Raise StoreUnreachable if nobody answers, UnsafeStore if create-if-absent does not hold here."""
        key = f"{SCRATCH}/probe-{uuid.uuid4().hex}"
        first = self.create(key, b"first")
        try:
            second = self.create(key, b"second")
            if not first or second or self.get(key) != b"first":
                raise UnsafeStore(
                    f"{self.url} ignores create-if-absent, so two workers could both believe that they were first",
                    remedy="use a server that honours If-None-Match on PutObject (AWS, R2 and Ceph do), or file://",
                )
        finally:
            with suppress(StoreError):  # what went wrong above is what the user needs to hear
                self.delete(key)


def spool_path(spool: BinaryIO) -> Path:
    """What a file without a name goes by, in this process."""
    spool.flush()
    return Path(f"/proc/self/fd/{spool.fileno()}")


def open_store(url: str, settings: StoreSettings | None = None) -> Store:
    """The store at a URL; nothing is contacted or created yet."""
    scheme, separator, rest = url.partition("://")
    if not separator and url and not url.startswith(("file:", "s3:")):
        return FileStore(Path(url).expanduser(), (settings or StoreSettings()).patience)
    if separator and scheme.lower() == "file":
        host, slash, path = rest.partition("/")
        if host not in ("", "localhost") or not slash:
            raise SettingsError("a file:// URL names no host", remedy="write file:///absolute/path, or a plain path")
        return FileStore(Path("/" + unquote(path)), (settings or StoreSettings()).patience)
    if separator and scheme.lower() == "s3":
        return S3Store(rest, settings or StoreSettings())
    raise SettingsError(
        f"no store has URLs that begin with `{scheme[:20]}`",
        remedy="write file:///folder, /folder or s3://bucket/prefix",
    )


class FileStore(Store):
    """A folder. Objects are written in its `.tmp` first, so the folder must be one filesystem.

    It may be one of another machine. While that is away the calls wait, and whichever the outage met is made again: so
    each can be made twice.
    """

    def __init__(self, root: Path, patience: float = PATIENCE) -> None:
        self.root, self.patience = root.resolve(), patience
        self.url = self.root.as_uri()

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        _check_range(start, end)

        def read() -> bytes:
            with self._path(key).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(start)
                return file.read(max(0, (size if end is None else min(end, size)) - start))

        return self._do(key, read)

    def opened(self, key: str) -> BinaryIO:
        """The object to read from, here and there, without a way to it each time."""
        return self._do(key, lambda: self._path(key).open("rb"))

    def put(self, key: str, data: bytes | Path) -> None:
        with self._scratch(key, data) as temporary:
            number = self._do(key, lambda: temporary.stat().st_ino, writing=True)

            def move() -> None:
                path = self._path(key)
                path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.replace(temporary, path)
                except FileNotFoundError:
                    if not path.exists() or path.stat().st_ino != number:
                        raise
                    # It was moved by a call whose answer was lost.
                _sync_folder(path.parent)

            self._do(key, move, writing=True)

    def create(self, key: str, data: bytes | Path) -> bool:
        with self._scratch(key, data) as temporary:

            def link() -> bool:
                path = self._path(key)
                path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(temporary, path)
                except FileExistsError:
                    if path.is_dir():
                        raise IsADirectoryError(path) from None
                    # The answer to a link that was made may have been lost; the link count knows.
                    if temporary.stat().st_nlink < 2:
                        return False
                _sync_folder(path.parent)
                return True

            return self._do(key, link, writing=True)

    def list_unchecked(self, prefix: str = "") -> Iterator[Entry]:
        folder, slash, _ = prefix.rpartition("/")
        yield from self._walk(folder + slash, prefix)

    def _walk(self, base: str, prefix: str) -> Iterator[Entry]:
        for key, entry in self._do(base, lambda: self._below(base, prefix)):
            if entry is not None:
                yield entry
            elif key != f"{SCRATCH}/":
                yield from self._walk(key, prefix)

    def _below(self, base: str, prefix: str) -> list[tuple[str, Entry | None]]:
        """What a folder holds: files, and folders, which come without an entry."""
        found: list[tuple[str, Entry | None]] = []
        try:
            listed = os.scandir(self._path(base[:-1]) if base else self.root)
        except (FileNotFoundError, NotADirectoryError):
            return found
        with listed:
            for item in listed:
                folder = item.is_dir(follow_symlinks=False)
                key = base + item.name + "/" * folder  # with its slash, a folder sorts where the keys below it do
                if not key.startswith(prefix) and not prefix.startswith(key):
                    continue
                if folder:
                    found.append((key, None))
                elif item.is_file(follow_symlinks=False):
                    with suppress(FileNotFoundError):  # deleted since it was seen
                        about = item.stat(follow_symlinks=False)
                        found.append((key, Entry(key, about.st_size, about.st_mtime)))
        return sorted(found, key=lambda pair: os.fsencode(pair[0]))

    def size(self, key: str) -> int | None:
        try:
            found = self._do(key, lambda: self._path(key).stat())
        except NotFound:
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def delete(self, key: str) -> None:
        with suppress(NotFound):
            self._do(key, lambda: self._path(key).unlink())

    def download(self, key: str, path: Path) -> None:
        with _appearing(path) as file:

            def copy() -> None:
                with self._path(key).open("rb") as found:
                    file.seek(0)
                    file.truncate()
                    shutil.copyfileobj(found, file, COPY_BYTES)

            self._do(key, copy)

    def spool(self) -> BinaryIO:
        def begin() -> BinaryIO:
            folder = self._path(SCRATCH)
            folder.mkdir(parents=True, exist_ok=True)
            try:  # not through tempfile, whose files may never get a name
                return os.fdopen(os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666), "w+b")
            except OSError:  # not every filesystem has them
                return tempfile.TemporaryFile(dir=folder)

        return self._do(SCRATCH, begin, writing=True)

    def now(self) -> float:
        with suppress(OSError), tempfile.TemporaryFile(dir=self.root) as new:
            return os.fstat(new.fileno()).st_mtime
        return time.time()  # it cannot be written: then nothing there can be deleted either

    def probe(self) -> None:
        super().probe()
        stale = self.now() - STALE_SECONDS
        with suppress(FileNotFoundError):
            for entry in os.scandir(self.root / SCRATCH):
                with suppress(FileNotFoundError):  # another probe was faster
                    if entry.stat().st_mtime < stale and _is_free(Path(entry.path)):
                        os.unlink(entry)

    def _path(self, key: str) -> Path:
        path = self.root
        for part in check_key(key).split("/"):
            path = path / part
            if path.is_symlink():  # it could lead anywhere
                raise StoreError(
                    f"{key!a} in {self.url} goes through a symbolic link",
                    remedy="put a real file or folder in its place",
                )
        return path

    @contextmanager
    def _scratch(self, key: str, data: bytes | Path) -> Iterator[Path]:
        """The data in a file of this filesystem, safely on disk."""
        temporary = self.root / SCRATCH / uuid.uuid4().hex
        with ExitStack() as opened:
            source = opened.enter_context(data.open("rb")) if isinstance(data, Path) else None

            def fill() -> None:
                self._path(SCRATCH).mkdir(parents=True, exist_ok=True)
                temporary.unlink(missing_ok=True)  # of an attempt that failed
                if source is not None and _named(source, temporary):
                    _hold(source)
                    return
                with ExitStack() as attempt:
                    file = attempt.enter_context(temporary.open("xb"))
                    _hold(file)
                    if source is None:
                        file.write(data)  # type: ignore[arg-type]
                    else:
                        if source.seekable():  # not a pipe, which only the first attempt can read
                            source.seek(0)
                        shutil.copyfileobj(source, file, COPY_BYTES)
                    _sync(file)
                    opened.enter_context(attempt.pop_all())  # held until it has its name

            try:
                self._do(key, fill, writing=True)
                yield temporary
            finally:
                with suppress(OSError):  # a later probe sweeps
                    temporary.unlink(missing_ok=True)

    def _do(self, key: str, work: Callable[[], T], *, writing: bool = False) -> T:
        with self._explained(key, writing=writing):
            return ride_out(self.url, work, _away, self.patience, FIRST_PAUSE)

    @contextmanager
    def _explained(self, key: str, *, writing: bool = False) -> Iterator[None]:
        try:
            yield
        except PermissionError as error:
            raise StoreUnreachable(
                f"{self.url} may not be {'written' if writing else 'read'} at {key!a}",
                remedy="give this user the right to read and write there",
            ) from error
        except OSError as error:
            if not writing and isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
                raise _not_found(self, key) from None
            if isinstance(error, IsADirectoryError | NotADirectoryError | FileExistsError):
                remedy = "on disk a key cannot be an object and a folder at once: choose another key"
            elif _away(error):
                remedy = "see that the disk is sound, or the server that it is mounted from up, then run again"
            else:
                remedy = "check the disk and its free space; the filesystem must allow hard links"
            raise StoreError(f"{self.url} failed at {key!a} ({error.strerror or error})", remedy=remedy) from error


class S3Store(Store):
    """A bucket, or a prefix in one, through boto3's low-level client, whose own retries are off: ours are the only."""

    def __init__(self, place: str, settings: StoreSettings) -> None:
        bucket, _, prefix = place.partition("/")
        prefix = prefix.rstrip("/")
        if not bucket or not all(letter.isascii() and (letter.isalnum() or letter in ".-_") for letter in bucket):
            # The URL is not repeated: it may be user:password@host.
            raise SettingsError("an s3:// URL names no bucket", remedy="write s3://bucket/prefix, without credentials")
        try:
            self.base = check_key(prefix) + "/" if prefix else ""
        except StoreError as error:
            raise SettingsError(f"an s3:// URL is wrong: {error.message}", remedy="write s3://bucket/prefix") from None
        self.bucket, self.settings = bucket, settings
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._lock = threading.Lock()
        self._client: tuple[int, Any] | None = None  # the process that made it, and the client

    def __reduce__(self) -> tuple[object, ...]:
        return S3Store, (self.url.removeprefix("s3://"), self.settings)

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        return self.get_tagged(key, start, end)[0]

    def get_tagged(self, key: str, start: int = 0, end: int | None = None) -> tuple[bytes, str]:
        _check_range(start, end)
        name = self._name(key)
        if start == end:  # HTTP cannot ask for no bytes
            if not self.exists(key):
                raise _not_found(self, key)
            return b"", ""

        def read() -> tuple[bytes, str]:
            (_, tag), chunks = self._read(name, start, end)
            return b"".join(chunks), tag

        with self._explained(key):
            return self._retry(read)

    def put(self, key: str, data: bytes | Path) -> None:
        self._write(key, data, {})

    def create(self, key: str, data: bytes | Path) -> bool:
        return self._write(key, data, {"IfNoneMatch": "*"})

    def list_unchecked(self, prefix: str = "") -> Iterator[Entry]:
        ask = {"Bucket": self.bucket, "Prefix": self.base + prefix, "MaxKeys": self.settings.page_size}
        while True:
            with self._explained(prefix):
                page: dict[str, Any] = self._retry(lambda: self._s3().list_objects_v2(**ask))
            for item in page.get("Contents", ()):
                key = item["Key"].removeprefix(self.base)
                # Browsers of buckets make empty objects called `folder/`.
                if not key.startswith(f"{SCRATCH}/") and not item["Key"].endswith("/"):
                    yield Entry(key, item["Size"], item["LastModified"].timestamp(), item.get("ETag", ""))
            if not page.get("IsTruncated"):
                return
            ask["ContinuationToken"] = page["NextContinuationToken"]

    def size(self, key: str) -> int | None:
        name = self._name(key)
        with self._explained(key):
            found = self._retry(lambda: self._found(name))
        return None if found is None else int(found["ContentLength"])

    def delete(self, key: str) -> None:
        name = self._name(key)
        with suppress(NotFound), self._explained(key):
            self._retry(lambda: self._s3().delete_object(Bucket=self.bucket, Key=name))

    def download(self, key: str, path: Path) -> None:
        name, step = self._name(key), self.settings.part_size
        with _appearing(path) as file, self._explained(key):

            def fetch(start: int) -> tuple[int, str]:
                (total, etag), chunks = self._read(name, start, start + step)
                at = start
                for chunk in chunks:
                    at += os.pwrite(file.fileno(), chunk, at)
                return total, etag

            total, etag = self._retry(lambda: fetch(0))
            with ThreadPoolExecutor(self.settings.connections) as pool:
                for part in pool.map(lambda start: self._retry(lambda: fetch(start)), range(step, total, step)):
                    if part != (total, etag):
                        raise StoreError(
                            f"{key!a} in {self.url} was replaced while it was read", remedy="run again; write it once"
                        )

    def now(self) -> float:
        ask = {"Bucket": self.bucket, "Prefix": self.base + SCRATCH, "MaxKeys": 1}
        with self._explained(SCRATCH):
            answer = self._retry(lambda: self._s3().list_objects_v2(**ask))
        date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        return parsedate_to_datetime(date).timestamp() if date else time.time()

    def probe(self) -> None:
        # Whoever waits at a prompt wants to hear of a wrong endpoint now, not after all the patience of a long job.
        patience, timeout = min(self.settings.patience, IMPATIENCE), min(self.settings.timeout, 10.0)
        impatient = self.settings.model_copy(update={"patience": patience, "timeout": timeout})
        Store.probe(S3Store(self.url.removeprefix("s3://"), impatient))

    def _read(self, name: str, start: int, end: int | None) -> tuple[tuple[int, str], Iterator[bytes]]:
        """The size and tag of the whole object, and bytes [start, end) of it in chunks; a short body raises."""
        from botocore.exceptions import ClientError

        ask = {"Bucket": self.bucket, "Key": name}
        if start or end is not None:
            ask["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        try:
            answer = self._s3().get_object(**ask)
        except ClientError as error:
            if _status(error) != 416:  # it begins past the end
                raise
            return (0, ""), iter(())
        if "Range" not in ask:
            total = answer["ContentLength"]
        elif "ContentRange" in answer:
            total = answer["ContentRange"].rpartition("/")[2]
        else:
            raise StoreError(f"{self.url} does not know ranges of bytes", remedy="use another S3 server")
        return (int(total), answer["ETag"]), answer["Body"].iter_chunks(COPY_BYTES)

    def _write(self, key: str, data: bytes | Path, condition: dict[str, str]) -> bool:
        name = self._name(key)
        size = data.stat().st_size if isinstance(data, Path) else len(data)
        writer = uuid.uuid4().hex  # stays with the object, so that a lost answer is no riddle
        with self._explained(key):
            if size >= self.settings.multipart_threshold:
                # A conflict spoils the upload: it is started again from the beginning.
                return self._retry(lambda: self._upload(name, data, size, writer, condition), when=_conflict)
            body = data.read_bytes() if isinstance(data, Path) else data
            return self._retry(lambda: self._put(name, body, writer, condition), when=_transient_or_conflict)

    def _put(self, name: str, body: bytes, writer: str, condition: dict[str, str]) -> bool:
        from botocore.exceptions import ClientError

        try:
            self._s3().put_object(Bucket=self.bucket, Key=name, Body=body, Metadata={"writer": writer}, **condition)
        except ClientError as error:
            if _status(error) != 412:
                raise
            return self._wrote(name, writer)
        return True

    def _upload(self, name: str, data: bytes | Path, size: int, writer: str, condition: dict[str, str]) -> bool:
        """One multipart upload, completed or aborted."""
        at = {"Bucket": self.bucket, "Key": name}
        if condition and self._retry(lambda: self._found(name)) is not None:
            return False
        begun = self._retry(lambda: self._s3().create_multipart_upload(**at, Metadata={"writer": writer}))
        at["UploadId"] = begun["UploadId"]
        step = max(self.settings.part_size, -(-size // MAX_PARTS))

        def send(number: int) -> dict[str, Any]:
            body = _slice(data, (number - 1) * step, step)
            sent = self._retry(lambda: self._s3().upload_part(**at, PartNumber=number, Body=body))
            return {"PartNumber": number, "ETag": sent["ETag"]}

        done = False
        try:
            with ThreadPoolExecutor(self.settings.connections) as pool:
                parts = list(pool.map(send, range(1, -(-size // step) + 1)))
            if not condition or self._retry(lambda: self._found(name)) is None:
                done = self._retry(lambda: self._complete(at, parts, writer, condition))
            return done
        finally:
            if not done:
                self._abort(at)

    def _complete(
        self, at: dict[str, str], parts: Sequence[dict[str, Any]], writer: str, condition: dict[str, str]
    ) -> bool:
        from botocore.exceptions import ClientError

        try:
            self._s3().complete_multipart_upload(**at, MultipartUpload={"Parts": parts}, **condition)
        except ClientError as error:
            # The upload is gone, or the object there: both are what a repeated call meets after an answer was lost.
            if _status(error) not in (404, 412):
                raise
            if self._wrote(at["Key"], writer):
                return True
            if _status(error) == 404:
                raise
            return False
        return True

    def _abort(self, at: dict[str, str]) -> None:
        try:
            self._s3().abort_multipart_upload(**at)
        except _boto_errors() as error:
            if _status(error) != 404:
                log.warning("an incomplete upload of %a stays behind in %s (%s)", at["Key"], self.url, _cause(error))

    def _found(self, name: str) -> dict[str, Any] | None:
        from botocore.exceptions import ClientError

        try:
            found: dict[str, Any] = self._s3().head_object(Bucket=self.bucket, Key=name)
        except ClientError as error:
            if _status(error) != 404:
                raise
            return None
        return found

    def _wrote(self, name: str, writer: str) -> bool:
        found = self._found(name)
        return found is not None and found.get("Metadata", {}).get("writer") == writer

    def _name(self, key: str) -> str:
        return self.base + check_key(key)

    def _s3(self) -> Any:
        with self._lock:
            if self._client is None or self._client[0] != os.getpid():
                self._client = os.getpid(), _connect(self.settings)
            return self._client[1]

    def _retry(self, work: Callable[[], T], when: Callable[[Exception], bool] | None = None) -> T:
        passes = when or _transient

        def cause(error: Exception) -> str:
            return _cause(error) if isinstance(error, _boto_errors()) and passes(error) else ""

        return ride_out(self.url, work, cause, self.settings.patience, self.settings.backoff)

    @contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        """boto's errors as ours. Their texts are left out: only names and codes are known to hold no secrets."""
        try:
            yield
        except _boto_errors() as error:
            raise (self._refused(key, error) if _status(error) else self._unreachable(error)) from None

    def _unreachable(self, error: Exception) -> StoreError:
        endpoint = _endpoint(self.settings)
        at = f" at {urlsplit(endpoint).netloc.rpartition('@')[2]}" if endpoint else ""
        return StoreUnreachable(
            f"{self.url} cannot be reached{at} ({_cause(error)})",
            remedy="check endpoint_url or AWS_ENDPOINT_URL, the network, and that there are credentials",
        )

    def _refused(self, key: str, error: Exception) -> StoreError:
        status, code = _status(error), _code(error)
        if code == "NoSuchBucket":
            return StoreUnreachable(f"there is no bucket {self.bucket}", remedy="create it, or correct the URL")
        if code == "RequestTimeTooSkewed":
            return StoreUnreachable(f"{self.url} refuses this machine's clock", remedy="set the clock, then run again")
        if status in (401, 403):
            return StoreUnreachable(
                f"{self.url} refuses the credentials ({_cause(error)})",
                remedy="check access_key and secret_key or AWS_*; they need get, put, delete and list on the bucket",
            )
        if status in (301, 307) or code in ("AuthorizationHeaderMalformed", "IllegalLocationConstraintException"):
            return StoreUnreachable(f"{self.url} is in another region ({_cause(error)})", remedy="set region")
        if status == 404 and code != "NoSuchUpload":
            return _not_found(self, key)
        if _transient(error):
            return StoreError(
                f"{self.url} kept failing at {key!a} ({_cause(error)})", remedy="look at the server, then run again"
            )
        return StoreError(
            f"{self.url} refused {key!a} ({_cause(error)})", remedy="look up the code in the server's log"
        )


# -- what S3 answers -------------------------------------------------------------------------------------------------

TRANSIENT_STATUS = {429, 500, 502, 503, 504}
# Among them what a server says of an upload that was torn on its way.
TRANSIENT_CODES = {
    *("SlowDown", "InternalError", "ServiceUnavailable", "Throttling", "ThrottlingException", "TooManyRequests"),
    *("RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"),
}


@functools.cache
def _models() -> Any:
    """boto's descriptions of services: parsed once a process, not once a store, which makes a store cost 30 ms."""
    from botocore.loaders import create_loader

    return create_loader()


def _connect(settings: StoreSettings) -> Any:
    import boto3
    import botocore.session
    from botocore.config import Config

    automatic = "path" if _endpoint(settings) else "auto"
    style = automatic if settings.path_style is None else "path" if settings.path_style else "virtual"
    config = Config(
        retries={"total_max_attempts": 1, "mode": "standard"},
        connect_timeout=min(settings.timeout, 10.0),
        read_timeout=settings.timeout,
        max_pool_connections=2 * settings.connections,
        signature_version="s3v4",
        s3={"addressing_style": style},
        # The signature covers the body; checksums in trailers are more than many servers understand.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    keys = {}
    if settings.access_key is not None and settings.secret_key is not None:
        keys = {
            "aws_access_key_id": settings.access_key.reveal(),
            "aws_secret_access_key": settings.secret_key.reveal(),
        }
    core = botocore.session.get_session()
    core.register_component("data_loader", _models())
    session = boto3.session.Session(region_name=settings.region, botocore_session=core, **keys)
    try:
        return session.client("s3", endpoint_url=settings.endpoint_url, config=config)
    except ValueError:  # its text holds the endpoint, which may hold a password
        raise SettingsError("AWS_ENDPOINT_URL is not a URL", remedy="write http://host:port or https://host") from None


def _endpoint(settings: StoreSettings) -> str | None:
    return settings.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def _boto_errors() -> tuple[type[Exception], ...]:
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    return ClientError, BotoCoreError, ResponseParserError


def _answer(error: Exception, part: str) -> dict[str, Any]:
    answer = getattr(error, "response", None)  # boto's errors without an answer have it too, as None
    return answer.get(part, {}) if isinstance(answer, dict) else {}


def _status(error: Exception) -> int:
    return int(_answer(error, "ResponseMetadata").get("HTTPStatusCode", 0))


def _code(error: Exception) -> str:
    return str(_answer(error, "Error").get("Code", ""))


def _cause(error: Exception) -> str:
    return f"{_status(error)} {_code(error)}" if _status(error) else type(error).__name__


def _conflict(error: Exception) -> bool:
    return _status(error) == 409


def _transient_or_conflict(error: Exception) -> bool:
    return _conflict(error) or _transient(error)


def _transient(error: Exception) -> bool:
    """No answer, a torn one, or one that says that it is the server's fault or that we are too fast."""
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError

    if isinstance(error, boto.SSLError | boto.ProxyConnectionError | boto.InvalidProxiesConfigError):
        return False
    torn = boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, ResponseParserError
    return isinstance(error, torn) or _status(error) in TRANSIENT_STATUS or _code(error) in TRANSIENT_CODES


def _away(error: Exception) -> str:
    """What passes by itself of a folder's errors."""
    return str(error.strerror) if isinstance(error, OSError) and error.errno in AWAY else ""


# -- shared ----------------------------------------------------------------------------------------------------------


def _not_found(store: Store, key: str) -> NotFound:
    return NotFound(f"there is no object {key!a} in {store.url}", remedy="check the store's URL and the key")


def _check_range(start: int, end: int | None) -> None:
    if start < 0 or (end is not None and end < start):
        raise ValueError(f"[{start}, {end}) is not a range of bytes")


def _slice(data: bytes | Path, start: int, length: int) -> bytes:
    if isinstance(data, bytes):
        return data[start : start + length]
    with data.open("rb") as file:
        file.seek(start)
        return file.read(length)


def _named(file: BinaryIO, path: Path) -> bool:
    """Whether a spool of this disk could be given a name in place of being copied; then it is safely on disk."""
    if os.fstat(file.fileno()).st_nlink:
        return False  # a file of somebody's: two names for it would let one change the other
    try:
        # Any folder, so that Python calls linkat: link would name the link in /proc, not the file.
        os.link(f"/proc/self/fd/{file.fileno()}", path, src_dir_fd=file.fileno(), follow_symlinks=True)
    except OSError:  # it lies on another disk
        return False
    _sync(file)
    return True


def _hold(file: BinaryIO) -> None:
    """Until it is closed, however its process ends, nobody takes it for left by a killed one."""
    with suppress(OSError):  # not every filesystem has locks
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_free(path: Path) -> bool:
    """Whether no process holds the file."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except OSError:
        return False


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """A new name survives a power cut once its folder is on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _appearing(path: Path) -> Iterator[BinaryIO]:
    """A file to fill that takes its name only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        with temporary.open("xb") as file:
            yield file
            _sync(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
