"""Shards behind http:// and https://, from any server that answers ranged requests."""

import functools
import os

import urllib3
from urllib3.exceptions import HTTPError, LocationParseError

from dalle_ds.config import InputError, ReadConfig
from dalle_ds.data.store import Stat, Transient, Unreadable, changed, check_range

# Servers that fail, or ask for patience; other 4xx are final.
TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}
MAX_CONNECTIONS = 64


@functools.cache
def _pool(process: int, stall_seconds: float) -> urllib3.PoolManager:
    """One pool a process: connections do not survive a fork. Tries again are made by stream.py alone."""
    timeout = urllib3.Timeout(connect=stall_seconds, read=stall_seconds)
    return urllib3.PoolManager(maxsize=MAX_CONNECTIONS, timeout=timeout, retries=urllib3.Retry(0, redirect=5))


class HttpStore:
    """Shards on a web server; the ETag, else Last-Modified, tells one version of a shard from the next."""

    def __init__(self, config: ReadConfig) -> None:
        self.config = config

    def stat(self, url: str) -> Stat:
        """By a request for the first byte: a URL that is signed for GET answers no HEAD."""
        response = self._get(url, {"Range": "bytes=0-0"}, {200, 206, 416})
        response.release_conn() if response.status != 200 else response.close()
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
        if response.status == 200:
            total = response.headers.get("Content-Length", "")
        if not total.isdigit():
            raise Unreadable(f"{url}: the server does not tell the length of the shard")
        return Stat(int(total), _version(response))

    def read_range(self, url: str, begin: int, end: int, expected: Stat) -> urllib3.BaseHTTPResponse:
        headers = {"Range": f"bytes={begin}-{end - 1}"}
        if expected.etag is not None and expected.etag.startswith('"'):  # a weak one never matches
            headers["If-Match"] = expected.etag
        response = self._get(url, headers, {200, 206, 412, 416})
        try:
            if response.status in (412, 416) or expected.etag not in (None, _version(response)):
                raise changed(url)
            check_range(url, response.headers.get("Content-Range"), begin, end, expected)
        except OSError:
            response.close()
            raise
        return response

    def find(self, pattern: str) -> list[str]:
        raise InputError(f"{pattern}: http has no folders or *: name the shards, for example train-{{000..009}}.tar")

    def read_small(self, url: str) -> bytes | None:
        response = self._get(url, {}, {200, 404, 403})
        try:
            return bytes(response.read()) if response.status == 200 else None
        except (HTTPError, OSError) as error:
            raise Transient(f"{url}: {error}") from error
        finally:
            response.close()

    def write_small(self, url: str, content: bytes) -> None:
        raise InputError(f"{url}: http cannot be written to: index a copy of the shards, and put index.jsonl here")

    def _get(self, url: str, headers: dict[str, str], good: set[int]) -> urllib3.BaseHTTPResponse:
        pool = _pool(os.getpid(), self.config.stall_seconds)
        try:
            response = pool.request(
                "GET", url, headers={"Accept-Encoding": "identity", **headers}, preload_content=False
            )
        except LocationParseError as error:
            raise InputError(f"{url}: not a URL ({error})") from None
        except (HTTPError, OSError) as error:
            raise Transient(f"{type(error).__name__}: {error}") from error
        if response.status in good:
            return response
        response.close()
        kind = Transient if response.status in TRANSIENT_STATUS else Unreadable
        raise kind(f"{url}: the server answers {response.status} {response.reason or ''}".rstrip())


def _version(response: urllib3.BaseHTTPResponse) -> str | None:
    return response.headers.get("ETag") or response.headers.get("Last-Modified")
