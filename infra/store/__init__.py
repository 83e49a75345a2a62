"""Object storage behind a URL: `file:///folder` (or a plain path) and `s3://bucket/prefix`, with one behaviour.

The rest of pixnerd relies on the following; `probe` checks `create` once at start-up:

- an object appears whole or not at all, even if its writer is killed;
- `create` is create-if-absent: of any number of writers exactly one is told True. On S3, for an object of
  `multipart_threshold` or more, this needs a server that honours the condition on CompleteMultipartUpload; older
  radosgw ignores it there, so existence is also checked just before. What remains is a race between two writers of
  the same large object, which is harmless because data objects carry their sha256 in their names. Records are small.
- `list` is sorted by the UTF-8 bytes of the keys, in folders as well, and leaves out everything under `.tmp/`.

A writer that is killed during a multipart upload leaves parts that no reader sees: give the bucket a lifecycle rule
that aborts incomplete uploads.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

from infra.errors import SettingsError
from infra.store.base import SCRATCH, Entry, Store, check_key, spool_path
from infra.store.file import FileStore
from infra.store.s3 import S3Store
from infra.store.settings import StoreSettings

__all__ = [
    "SCRATCH",
    "Entry",
    "FileStore",
    "S3Store",
    "Store",
    "StoreSettings",
    "check_key",
    "open_store",
    "spool_path",
]


def open_store(url: str, settings: StoreSettings | None = None) -> Store:
    """The store at a URL; nothing is contacted or created yet."""
    settings = settings or StoreSettings()
    scheme, separator, rest = url.partition("://")
    if not separator and url and not url.startswith(("file:", "s3:")):
        return FileStore(Path(url).expanduser(), settings.patience)
    if separator and scheme.lower() == "file":
        host, slash, path = rest.partition("/")
        if host not in ("", "localhost") or not slash:
            raise SettingsError("a file:// URL names no host", remedy="write file:///absolute/path, or a plain path")
        return FileStore(Path("/" + unquote(path)), settings.patience)
    if separator and scheme.lower() == "s3":
        return S3Store(rest, settings)
    raise SettingsError(
        f"no store has URLs that begin with `{scheme[:20]}`",
        remedy="write file:///folder, /folder or s3://bucket/prefix",
    )
