"""Shards in S3 and what speaks its protocol; the only file that imports boto3.

Endpoint, region and credentials come from the standard AWS chain (AWS_ENDPOINT_URL, AWS_PROFILE, ~/.aws, roles).
"""

import fnmatch
import functools
import hashlib
import os
import re
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dalle_ds.config import InputError, ReadConfig
from dalle_ds.data.store import Body, Stat, Transient, Unreadable, changed, check_range

SUFFIX = ".tar"
LOOPBACK = re.compile(r"localhost|127\.\d+\.\d+\.\d+|::1")
MAX_CONNECTIONS = 64
WRITE_BYTES = 2**26  # of a part of a file that is written
# What S3 and its kin say when they want patience; any status of 500 and above counts too.
PATIENCE = {
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "RequestLimitExceeded",
    "RequestTimeout",
    "TooManyRequests",
}
GONE = {"NoSuchKey", "NoSuchBucket", "NotFound", "404"}
_making = threading.Lock()


@functools.cache
def _client(process: int, stall_seconds: float, endpoint: str | None) -> Any:
    """One client a process (connections do not survive a fork) and endpoint."""
    import boto3
    from botocore.config import Config

    config = Config(
        connect_timeout=stall_seconds,
        read_timeout=stall_seconds,
        max_pool_connections=MAX_CONNECTIONS,
        # Tries again are made by stream.py alone: they must go on inside a body, which botocore's do not.
        retries={"mode": "standard", "total_max_attempts": 1},
        # Whole-object checksums do not apply to ranges, and the index has its own.
        response_checksum_validation="when_required",
    )
    session = boto3.Session()
    client = session.client("s3", config=config)
    if LOOPBACK.fullmatch(urlsplit(client.meta.endpoint_url).hostname or ""):
        # There is no bucket.localhost.
        client = session.client("s3", config=config.merge(Config(s3={"addressing_style": "path"})))
    return client


class S3Store:
    """Shards in a bucket; If-Match on the ETag holds every read to one version."""

    def __init__(self, config: ReadConfig) -> None:
        self.config = config

    def stat(self, url: str) -> Stat:
        found = self._call("head_object", url)
        etag = found["ETag"]
        plain = re.fullmatch('"([0-9a-f]{32})"', etag)  # of several parts: not the MD5, and with a dash
        md5 = plain[1] if plain and found.get("ServerSideEncryption") in (None, "AES256") else None
        return Stat(found["ContentLength"], etag, md5)

    def read_range(self, url: str, begin: int, end: int, expected: Stat) -> Body:
        match = {} if expected.etag is None else {"IfMatch": expected.etag}
        answer = self._call("get_object", url, Range=f"bytes={begin}-{end - 1}", **match)
        # urllib3's own response: it can be woken from another thread.
        body: Body = answer["Body"]._raw_stream
        try:
            if expected.etag not in (None, answer["ETag"]):
                raise changed(url)
            check_range(url, answer.get("ContentRange"), begin, end, expected)
        except OSError:
            body.close()
            raise
        return body

    def find(self, pattern: str) -> list[str]:
        """Shards right under a prefix (`s3://bucket/folder`), or that `*` matches."""
        bucket, key = split(pattern)
        fixed = re.split(r"[*?\[]", key)[0]
        if fixed == key:
            fixed = f"{key.rstrip('/')}/" if key else ""
            key = f"{fixed}*{SUFFIX}"
        listing: dict[str, Any] = {"Prefix": fixed}
        found: list[str] = []
        while True:
            answer = self._call("list_objects_v2", f"s3://{bucket}", **listing)
            found += (entry["Key"] for entry in answer.get("Contents", []))
            if not answer.get("IsTruncated"):
                break
            listing["ContinuationToken"] = answer["NextContinuationToken"]
        depth = key.count("/")
        return sorted(
            f"s3://{bucket}/{name}" for name in found if name.count("/") == depth and fnmatch.fnmatchcase(name, key)
        )

    def read_small(self, url: str) -> bytes | None:
        try:
            answer = self._call("get_object", url)
        except Unreadable as error:
            if getattr(error.__cause__, "response", {}).get("Error", {}).get("Code") in GONE:
                return None
            raise
        from botocore.exceptions import BotoCoreError

        try:
            return bytes(answer["Body"].read())
        except (BotoCoreError, OSError) as error:
            raise Transient(f"{url}: {error}") from error

    def write_small(self, url: str, content: bytes) -> None:
        self._call("put_object", url, Body=content)

    def write_file(self, url: str, path: Path, stopped: threading.Event | None = None) -> None:
        """Puts a file of any size in place, and checks what has arrived: its length, and the MD5 of each part.

        Gives up soon after `stopped` is set, with Transient.
        """
        from boto3.s3.transfer import TransferConfig

        def go_on(n_bytes: int) -> None:
            if stopped is not None and stopped.is_set():
                raise Transient(f"{url}: given up")

        parts = TransferConfig(multipart_threshold=WRITE_BYTES, multipart_chunksize=WRITE_BYTES)
        self._call("upload_file", url, Filename=str(path), Config=parts, Callback=go_on)
        found, n_bytes = self._call("head_object", url), path.stat().st_size
        is_plain = found.get("ServerSideEncryption") in (None, "AES256")  # otherwise the ETag is no MD5
        if found["ContentLength"] != n_bytes or (is_plain and found["ETag"].strip('"') != _etag(path, n_bytes)):
            raise Transient(f"{url}: what has arrived is not what {path} holds")

    def read_file(self, url: str, path: Path) -> None:
        """Copies a file of any size to the disk; what it holds, the caller must check."""
        self._call("download_file", url, Filename=str(path))

    def _call(self, operation: str, url: str, **arguments: Any) -> Any:
        """One request, with its failure told as Transient, Unreadable or InputError."""
        from boto3.exceptions import RetriesExceededError, S3UploadFailedError
        from botocore import exceptions
        from botocore.parsers import ResponseParserError
        from s3transfer.exceptions import S3DownloadFailedError

        bucket, key = split(url)
        if key:
            arguments["Key"] = key
        try:
            with _making:
                client = _client(os.getpid(), self.config.stall_seconds, os.environ.get("AWS_ENDPOINT_URL"))
            return getattr(client, operation)(Bucket=bucket, **arguments)
        except exceptions.ClientError as error:
            raise _explained(url, error.response) from error
        except S3UploadFailedError as error:
            if isinstance(error.__context__, exceptions.ClientError):
                raise _explained(url, error.__context__.response) from error
            raise Transient(f"{url}: {error}") from error
        except (RetriesExceededError, S3DownloadFailedError, exceptions.HTTPClientError, ResponseParserError) as error:
            raise Transient(f"{type(error).__name__}: {error}") from error
        except (exceptions.BotoCoreError, ValueError) as error:
            raise InputError(
                f"{url}: {error}: check the AWS settings (AWS_ENDPOINT_URL, AWS_REGION, AWS_PROFILE or keys)"
            ) from error


def split(url: str) -> tuple[str, str]:
    """Bucket and key of an s3:// URL. Raises InputError when there is no bucket."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if not bucket:
        raise InputError(f"{url}: no bucket: give s3://bucket/prefix-{{000..009}}.tar or s3://bucket/folder")
    return bucket, key


def _etag(path: Path, n_bytes: int) -> str:
    """What S3 says of a file that came as `write_file` sends it: its MD5, or that of the MD5s of its parts."""
    with path.open("rb") as file:
        digests = [hashlib.md5(part, usedforsecurity=False) for part in iter(lambda: file.read(WRITE_BYTES), b"")]
    if n_bytes < WRITE_BYTES:
        return digests[0].hexdigest() if digests else hashlib.md5(b"", usedforsecurity=False).hexdigest()
    whole = hashlib.md5(b"".join(digest.digest() for digest in digests), usedforsecurity=False)
    return f"{whole.hexdigest()}-{len(digests)}"


def _explained(url: str, response: Any) -> OSError:
    code = response["Error"].get("Code", "")
    status = response["ResponseMetadata"].get("HTTPStatusCode", 0)
    if status >= 500 or status == 429 or code in PATIENCE:
        return Transient(f"{url}: S3 answers {status} {code}")
    if status in (412, 416):
        return changed(url)
    if status == 404:
        return Unreadable(f"{url}: not there ({code})")
    said = response["Error"].get("Message", "")
    return Unreadable(f"{url}: S3 answers {status} {code}: {said}")
