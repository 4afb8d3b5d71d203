"""A real S3 server (moto) in a process of its own on loopback, and a proxy before it that spoils what passes."""

import http.client
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SLOW_DOWN = b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code><Message>Wait</Message></Error>'
FAULTS = ("reset", "cut", "slow_down", "stall", "wrong")


class S3Server:
    """moto's server; `endpoint` is its address."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert self.process.poll() is None, "moto does not start"
                assert time.monotonic() < deadline, "moto does not answer"
                time.sleep(0.1)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class FaultyProxy:
    """Passes requests on to `port`; a share `rate` of the reads of shards goes wrong, in ways drawn from FAULTS.

    `always` maps a key's end to a fault that every read of it meets. `injected` counts the faults, `requests` lists
    the reads.
    """

    def __init__(self, port: int, seed: int = 0) -> None:
        self.port, self.rng, self.lock = port, random.Random(seed), threading.Lock()
        self.rate, self.weights = 0.0, [1.0] * len(FAULTS)
        self.always: dict[str, str] = {}
        self.script: list[str] = []  # faults of the next reads, before any drawn one
        self.injected: Counter[str] = Counter()
        self.requests: list[tuple[str, str]] = []  # path and range
        self.stall_seconds = 5.0
        self.ended = threading.Event()
        handler = type("Handler", (_Handler,), {"proxy": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def draw(self, path: str, span: str) -> str:
        """The fault that this read meets, or nothing."""
        with self.lock:
            self.requests.append((path, span))
            kind = next((kind for end, kind in self.always.items() if path.endswith(end)), "")
            if not kind and self.script:
                kind = self.script.pop(0)
            if not kind and self.rng.random() < self.rate:
                kind = self.rng.choices(FAULTS, self.weights)[0]
            if kind:
                self.injected[kind] += 1
            return kind

    def place(self, n_bytes: int) -> int:
        with self.lock:
            return self.rng.randrange(n_bytes)

    def close(self) -> None:
        self.ended.set()
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    proxy: Any
    protocol_version = "HTTP/1.1"

    def handle_request(self) -> None:
        is_shard = self.command == "GET" and self.path.partition("?")[0].endswith(".tar")
        fault = self.proxy.draw(self.path, self.headers.get("Range", "")) if is_shard else ""
        if fault == "slow_down":
            return self.answer(503, [("Content-Type", "application/xml")], SLOW_DOWN)
        upstream = http.client.HTTPConnection("127.0.0.1", self.proxy.port, timeout=60)
        length = int(self.headers.get("Content-Length", 0))
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        upstream.request(self.command, self.path, self.rfile.read(length), headers)
        answer = upstream.getresponse()
        body = answer.read()
        upstream.close()
        if answer.status != 206:
            fault = ""
        if fault == "ignored_range":
            self.answer(200, [("ETag", answer.headers["ETag"])], body)
        elif fault == "shorter":  # a whole answer of an object that was cut
            total = int(answer.headers["Content-Range"].rpartition("/")[2]) - 1024
            begin = int(answer.headers["Content-Range"].split()[1].partition("-")[0])
            kept = body[: max(0, total - begin)]
            span = f"bytes {begin}-{begin + len(kept) - 1}/{total}"
            self.answer(206, [("ETag", answer.headers["ETag"]), ("Content-Range", span)], kept)
        else:
            if fault == "wrong" and body:
                place = self.proxy.place(len(body))
                body = body[:place] + bytes([body[place] ^ 0x20]) + body[place + 1 :]
            self.answer(answer.status, answer.getheaders(), body, fault)

    def answer(self, status: int, headers: list[tuple[str, str]], body: bytes, fault: str = "") -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("connection", "content-length", "transfer-encoding"):
                self.send_header(name, value)
        head = self.command == "HEAD"
        length = next((value for name, value in headers if name.lower() == "content-length"), "0")
        self.send_header("Content-Length", length if head else str(len(body)))
        self.end_headers()
        if head:
            return
        broken = fault in ("reset", "cut", "stall")
        self.wfile.write(body[: self.proxy.place(len(body))] if broken and body else body)
        if fault == "stall":
            self.proxy.ended.wait(self.proxy.stall_seconds)
        if broken:
            self.wfile.flush()
            if fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.rfile.close()
            self.wfile.close()
            self.connection.close()

    def handle(self) -> None:
        try:
            super().handle()
        except (OSError, ValueError):
            self.close_connection = True  # the client, or this fault, has closed it

    def log_message(self, *_: object) -> None:
        pass

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_request
