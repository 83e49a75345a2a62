"""Tables of the URLs of images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from data_prep.rejections import Cause, Rejection
from data_prep.sources import fields, parquet, words
from data_prep.sources.base import Range, Rows, Url, UrlSource
from data_prep.sources.tables import NAME_BATCH, Picture, Reading, Tables, plain_name
from data_prep.web.addresses import http_url
from infra.store import Store


class UrlList(Tables, UrlSource):
    """Images on the web, named by the rows of tables in a folder, as of a table_folder; an item's origin is its URL."""

    kind: Literal["url_list"]
    image: str = Field("url", description="the column of URLs")

    def urls(self, store: Store, part: Range) -> Iterator[tuple[int, str | Rejection]]:
        assert isinstance(part, Rows)
        for number, row in parquet.rows(self, store, part, [self.image], NAME_BATCH):
            yield number, row if isinstance(row, Rejection) else _url(fields.field(row, self.image))

    def picture(self, number: int, row: dict[str, Any], place: str, reading: Reading) -> Picture:
        value = fields.field(row, self.image)
        name = (words.text(value) or "").strip()
        return Picture(name, plain_name(name), _url(value))

    def origin_of(self, row: dict[str, Any], name: str) -> str:
        return words.shown(name)


def _url(value: bytes | str | None) -> Url | Rejection:
    name = words.text(value)
    if not name or not name.strip():
        return Rejection(Cause.BAD_URL, "empty or not UTF-8")
    url = http_url(name.strip())
    return url if isinstance(url, Rejection) else Url(url.text)
