"""A store that is a bucket of S3, or of a server with the same protocol."""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

from infra.errors import NotFound, SettingsError, StoreError, StoreUnreachable
from infra.files import appearing
from infra.outage import ride_out
from infra.store.base import COPY_BYTES, SCRATCH, Entry, Store, check_key, check_range, not_found
from infra.store.settings import IMPATIENCE, StoreSettings

T = TypeVar("T")
log = logging.getLogger(__name__)

MAX_PARTS = 10_000  # of one multipart upload


class S3Store(Store):
    """A bucket, or a prefix in one, through boto3's low-level client. Its own retries are off: `_retry` does them."""

    def __init__(self, bucket_and_prefix: str, settings: StoreSettings) -> None:
        bucket, _, prefix = bucket_and_prefix.partition("/")
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
        check_range(start, end)
        name = self._name(key)
        if start == end:  # HTTP has no empty ranges
            if not self.exists(key):
                raise not_found(self, key)
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
        request = {"Bucket": self.bucket, "Prefix": self.base + prefix, "MaxKeys": self.settings.page_size}
        while True:
            with self._explained(prefix):
                page: dict[str, Any] = self._retry(lambda: self._s3().list_objects_v2(**request))
            for item in page.get("Contents", ()):
                key = item["Key"].removeprefix(self.base)
                # Bucket browsers create empty objects called `folder/`.
                if not key.startswith(f"{SCRATCH}/") and not item["Key"].endswith("/"):
                    yield Entry(key, item["Size"], item["LastModified"].timestamp(), item.get("ETag", ""))
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def size(self, key: str) -> int | None:
        name = self._name(key)
        with self._explained(key):
            head = self._retry(lambda: self._head(name))
        return None if head is None else int(head["ContentLength"])

    def delete(self, key: str) -> None:
        name = self._name(key)
        with suppress(NotFound), self._explained(key):
            self._retry(lambda: self._s3().delete_object(Bucket=self.bucket, Key=name))

    def download(self, key: str, path: Path) -> None:
        name, step = self._name(key), self.settings.part_size
        path.parent.mkdir(parents=True, exist_ok=True)
        with appearing(path) as unfinished, unfinished.open("xb") as file, self._explained(key):

            def fetch(start: int) -> tuple[int, str]:
                (total, etag), chunks = self._read(name, start, start + step)
                offset = start
                for chunk in chunks:
                    offset += os.pwrite(file.fileno(), chunk, offset)
                return total, etag

            total, etag = self._retry(lambda: fetch(0))
            with ThreadPoolExecutor(self.settings.connections) as pool:
                for part in pool.map(lambda start: self._retry(lambda: fetch(start)), range(step, total, step)):
                    if part != (total, etag):
                        raise StoreError(
                            f"{key!a} in {self.url} was replaced while it was read", remedy="run again; write it once"
                        )

    def now(self) -> float:
        request = {"Bucket": self.bucket, "Prefix": self.base + SCRATCH, "MaxKeys": 1}
        with self._explained(SCRATCH):
            answer = self._retry(lambda: self._s3().list_objects_v2(**request))
        date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        return parsedate_to_datetime(date).timestamp() if date else time.time()

    def probe(self) -> None:
        # A user at a prompt should learn of a wrong endpoint at once, not after the patience of a long job.
        patience, timeout = min(self.settings.patience, IMPATIENCE), min(self.settings.timeout, 10.0)
        impatient = self.settings.model_copy(update={"patience": patience, "timeout": timeout})
        Store.probe(S3Store(self.url.removeprefix("s3://"), impatient))

    def _read(self, name: str, start: int, end: int | None) -> tuple[tuple[int, str], Iterator[bytes]]:
        """The size and tag of the whole object, and bytes [start, end) of it in chunks; a short body raises."""
        request = {"Bucket": self.bucket, "Key": name}
        if start or end is not None:
            request["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        try:
            answer = self._s3().get_object(**request)
        except Exception as error:
            if _status(error) != 416:  # 416: the range begins past the end
                raise
            return (0, ""), iter(())
        if "Range" not in request:
            total = answer["ContentLength"]
        elif "ContentRange" in answer:
            total = answer["ContentRange"].rpartition("/")[2]
        else:
            raise StoreError(f"{self.url} does not know ranges of bytes", remedy="use another S3 server")
        return (int(total), answer["ETag"]), answer["Body"].iter_chunks(COPY_BYTES)

    def _write(self, key: str, data: bytes | Path, condition: dict[str, str]) -> bool:
        name = self._name(key)
        size = data.stat().st_size if isinstance(data, Path) else len(data)
        writer = uuid.uuid4().hex  # stored with the object, to tell after a lost answer who wrote it
        with self._explained(key):
            if size >= self.settings.multipart_threshold:
                # After a conflict the upload cannot go on: it is started again from the beginning.
                return self._retry(lambda: self._upload(name, data, size, writer, condition), when=_conflict)
            body = data.read_bytes() if isinstance(data, Path) else data
            return self._retry(lambda: self._put(name, body, writer, condition), when=_transient_or_conflict)

    def _put(self, name: str, body: bytes, writer: str, condition: dict[str, str]) -> bool:
        try:
            self._s3().put_object(Bucket=self.bucket, Key=name, Body=body, Metadata={"writer": writer}, **condition)
        except Exception as error:
            if _status(error) != 412:
                raise
            return self._wrote(name, writer)
        return True

    def _upload(self, name: str, data: bytes | Path, size: int, writer: str, condition: dict[str, str]) -> bool:
        """One multipart upload, completed or aborted."""
        upload = {"Bucket": self.bucket, "Key": name}
        if condition and self._retry(lambda: self._head(name)) is not None:
            return False
        begun = self._retry(lambda: self._s3().create_multipart_upload(**upload, Metadata={"writer": writer}))
        upload["UploadId"] = begun["UploadId"]
        step = max(self.settings.part_size, -(-size // MAX_PARTS))

        def send(number: int) -> dict[str, Any]:
            body = _slice(data, (number - 1) * step, step)
            sent = self._retry(lambda: self._s3().upload_part(**upload, PartNumber=number, Body=body))
            return {"PartNumber": number, "ETag": sent["ETag"]}

        done = False
        try:
            with ThreadPoolExecutor(self.settings.connections) as pool:
                parts = list(pool.map(send, range(1, -(-size // step) + 1)))
            if not condition or self._retry(lambda: self._head(name)) is None:
                done = self._retry(lambda: self._complete(upload, parts, writer, condition))
            return done
        finally:
            if not done:
                self._abort(upload)

    def _complete(
        self, upload: dict[str, str], parts: Sequence[dict[str, Any]], writer: str, condition: dict[str, str]
    ) -> bool:
        try:
            self._s3().complete_multipart_upload(**upload, MultipartUpload={"Parts": parts}, **condition)
        except Exception as error:
            # 404: no such upload; 412: the object exists. A repeated call gets these if the first answer was lost.
            if _status(error) not in (404, 412):
                raise
            if self._wrote(upload["Key"], writer):
                return True
            if _status(error) == 404:
                raise
            return False
        return True

    def _abort(self, upload: dict[str, str]) -> None:
        try:
            self._s3().abort_multipart_upload(**upload)
        except _boto_errors() as error:
            if _status(error) != 404:
                log.warning(
                    "an incomplete upload of %a stays behind in %s (%s)", upload["Key"], self.url, _cause(error)
                )

    def _head(self, name: str) -> dict[str, Any] | None:
        """The answer to a HEAD request; None if there is no object."""
        try:
            return cast(dict[str, Any], self._s3().head_object(Bucket=self.bucket, Key=name))
        except Exception as error:
            if _status(error) != 404:
                raise
            return None

    def _wrote(self, name: str, writer: str) -> bool:
        head = self._head(name)
        return head is not None and head.get("Metadata", {}).get("writer") == writer

    def _name(self, key: str) -> str:
        return self.base + check_key(key)

    def _s3(self) -> Any:
        with self._lock:
            if self._client is None or self._client[0] != os.getpid():
                self._client = os.getpid(), _connect(self.settings)
            return self._client[1]

    def _retry(self, work: Callable[[], T], when: Callable[[Exception], bool] | None = None) -> T:
        is_temporary = when or _transient

        def cause(error: Exception) -> str:
            return _cause(error) if isinstance(error, _boto_errors()) and is_temporary(error) else ""

        return ride_out(self.url, work, cause, self.settings.patience, self.settings.backoff)

    @contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        """Raises boto's errors as ours, without their texts: only names and codes are known to hold no secrets."""
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
            return not_found(self, key)
        if _transient(error):
            return StoreError(
                f"{self.url} kept failing at {key!a} ({_cause(error)})", remedy="look at the server, then run again"
            )
        return StoreError(
            f"{self.url} refused {key!a} ({_cause(error)})", remedy="look up the code in the server's log"
        )


# -- what S3 answers -------------------------------------------------------------------------------------------------

TRANSIENT_STATUS = {429, 500, 502, 503, 504}
# Some of these are what a server answers to an upload that was cut off on its way.
TRANSIENT_CODES = {
    *("SlowDown", "InternalError", "ServiceUnavailable", "Throttling", "ThrottlingException", "TooManyRequests"),
    *("RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"),
}


@functools.cache
def _models() -> Any:
    """boto's descriptions of services. Parsing them takes 30 ms, so it is done once a process, not once a store."""
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
        # The signature covers the body, and many servers do not understand checksums in trailers.
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
    except ValueError:  # not repeated: the endpoint in its text may contain a password
        raise SettingsError("AWS_ENDPOINT_URL is not a URL", remedy="write http://host:port or https://host") from None


def _endpoint(settings: StoreSettings) -> str | None:
    return settings.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def _boto_errors() -> tuple[type[Exception], ...]:
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    return ClientError, BotoCoreError, ResponseParserError


def _answer(error: Exception, part: str) -> dict[str, Any]:
    answer = getattr(error, "response", None)  # None in boto's errors without an answer
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
    """Whether there was no answer, an incomplete one, or one that blames the server or asks to slow down."""
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError

    if isinstance(error, boto.SSLError | boto.ProxyConnectionError | boto.InvalidProxiesConfigError):
        return False
    incomplete = boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, ResponseParserError
    return isinstance(error, incomplete) or _status(error) in TRANSIENT_STATUS or _code(error) in TRANSIENT_CODES


def _slice(data: bytes | Path, start: int, length: int) -> bytes:
    if isinstance(data, bytes):
        return data[start : start + length]
    with data.open("rb") as file:
        file.seek(start)
        return file.read(length)
