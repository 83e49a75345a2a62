"""The settings of the connection to a store."""

from __future__ import annotations

from urllib.parse import urlsplit

from pydantic import ConfigDict, field_validator, model_validator

from infra.config import Secret, Settings, operational

MIB = 1 << 20
PATIENCE = 75.0  # seconds that an outage may last; less than claim.PATIENCE_SECONDS, so claims survive it
FIRST_PAUSE = 0.2
IMPATIENCE = 2.0  # the same where a user waits at a prompt


class StoreSettings(Settings):
    """How an s3:// store is reached. What is not set here comes from the standard AWS_* variables and files."""

    model_config = ConfigDict(hide_input_in_errors=True)  # a user may have written a password into an endpoint or a key

    endpoint_url: str | None = operational(None, description="of a server that is not AWS: http://host:port")
    region: str | None = operational(None)
    access_key: Secret | None = operational(None, description="set with secret_key; every node must be able to read it")
    secret_key: Secret | None = operational(None)
    path_style: bool | None = operational(
        None, description="the bucket's name in the path; none: yes where an endpoint is named, no on AWS itself"
    )
    patience: float = operational(PATIENCE, ge=0, description="seconds that an outage may last, also of a folder")
    timeout: float = operational(60.0, gt=0, description="seconds without a byte")
    backoff: float = operational(FIRST_PAUSE, ge=0, description="seconds, the longest that the first pause can be")
    connections: int = operational(8, ge=1, description="parts of one large object in flight")
    multipart_threshold: int = operational(64 * MIB, ge=1, description="bytes from which an object is sent in parts")
    part_size: int = operational(16 * MIB, ge=5 * MIB, description="bytes of a part; S3 takes no smaller ones")
    page_size: int = operational(1000, ge=1, le=1000, description="keys that are listed at once")

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
