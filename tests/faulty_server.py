"""A web server on loopback that serves a dict of files and fails as it is told to, one fault per request."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FaultyServer:
    """`files` {path: content} at `url`; `faults` {path: what goes wrong with its next GETs, in order}.

    Faults: "cut" (half of the body, then the connection is closed), "stall" (half of it, then nothing), "short" (the
    end of the body is missing and Content-Length fits), a status (int), and "changed": the file is another one from
    then on. With `ranges` false, Range is ignored; with `etags` false there are none.
    """

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, deque] = {}
        self.headers: dict[str, dict[str, str]] = {}  # path -> what is sent besides
        self.redirects: dict[str, str] = {}
        self.ranges, self.etags, self.delay = True, True, 0.0
        self.requests: list[tuple[str, str, str | None]] = []  # (method, path, Range)
        self.agents: set[str] = set()
        self.open_now, self.most_open = 0, 0
        self.lock, self.closing = threading.Lock(), threading.Event()
        handler = type("Handler", (_Handler,), {"owner": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def gets(self, path: str) -> list[str | None]:
        """The Range of every GET of `path`."""
        return [asked for method, where, asked in self.requests if method == "GET" and where == path]


class _Handler(BaseHTTPRequestHandler):
    owner: FaultyServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer("HEAD")

    def do_GET(self):
        owner = self.owner
        with owner.lock:
            owner.open_now += 1
            owner.most_open = max(owner.most_open, owner.open_now)
        try:
            time.sleep(owner.delay)
            self._answer("GET")
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with owner.lock:
                owner.open_now -= 1

    def _answer(self, method: str) -> None:
        owner, path = self.owner, self.path.partition("?")[0]
        with owner.lock:
            owner.requests.append((method, path, self.headers["Range"]))
            owner.agents.add(self.headers["User-Agent"])
            waiting = owner.faults.get(path)
            fault = waiting.popleft() if method == "GET" and waiting else None
            if fault == "changed":
                owner.files[path] = owner.files[path][::-1]
            content = owner.files.get(path)
        if path in owner.redirects:
            return self._send(302, {"Location": owner.redirects[path]}, b"", method)
        if content is None or isinstance(fault, int):
            return self._send(fault or 404, {"Retry-After": "0"}, b"<html>no</html>", method)
        headers = {"ETag": f'"{hashlib.md5(content).hexdigest()}"'} if owner.etags else {}
        headers |= owner.headers.get(path, {})
        status, body = 200, content
        if owner.ranges and (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")):
            first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
            status, body = 206, content[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        if fault == "short":
            body = body[: len(body) // 2]
        self._send(status, headers, body, method, cut=fault in ("cut", "stall"))
        if fault == "stall":
            owner.closing.wait(30)

    def _send(self, status: int, headers: dict[str, str], body: bytes, method: str, *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if method == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
            self.wfile.flush()
        self.close_connection = self.close_connection or cut
