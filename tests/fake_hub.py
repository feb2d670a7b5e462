"""A HuggingFace Hub on this machine: what huggingface_hub asks for when a model is pushed and loaded, and failures.

with FakeHub() as hub: subprocess.run(..., env=hub.environment(home))
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

TOKEN = "hf_secretsecretsecretsecretsecretsecret"
NOBODY = "0" * 40  # the commit of an empty repository


@dataclass
class Repo:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def head(self) -> str:
        return self.commits[-1] if self.commits else NOBODY


class FakeHub:
    """repos by id; `fail` holds (method, pattern of the path, what, how often) for answers to come.

    What: a status; "drop" the connection; or "hang": `hangs` is set, nothing is read until `go`, then it drops.
    """

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}  # by SHA-256
        self.fail: list[tuple[str, str, int | str, int]] = []
        self.asked: list[tuple[str, str]] = []
        self.hangs, self.go = threading.Event(), threading.Event()

    def __enter__(self) -> FakeHub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.go.set()
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """For a process whose Hub this is; huggingface_hub reads it when it is imported."""
        values = {"HF_ENDPOINT": f"http://127.0.0.1:{self._server.server_port}", "HF_HOME": str(home)}
        values |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        return values | ({"HF_TOKEN": token} if token else {})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_) -> None:
        """Silent."""

    def _answer(self, status: int, content: Any = None, *, raw: bytes | None = None, **headers: str) -> None:
        data = json.dumps(content if content is not None else {}).encode() if raw is None else raw
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _failure(self, path: str) -> int | str | None:
        for number, (method, pattern, what, left) in enumerate(self.hub.fail):
            if left and method == self.command and re.search(pattern, path):
                self.hub.fail[number] = (method, pattern, what, left - 1)
                return what
        return None

    def _handle(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.hub.asked.append((self.command, path))
        failure = self._failure(path)
        if failure == "hang":
            self.hub.hangs.set()
            self.hub.go.wait()
        if failure in ("hang", "drop"):
            self.close_connection = True
            self.connection.close()
            return
        body = self._read()
        if failure is not None:
            self._answer(failure, {"error": "injected"})
            return
        if path.startswith("/api/") and (given := self.headers.get("Authorization")) != f"Bearer {TOKEN}":
            self._answer(401, {"error": f"Invalid credentials: {given}"})
            return
        for pattern, act in _ROUTES:
            if found := re.fullmatch(pattern, path):
                act(self, body, *found.groups())
                return
        self._answer(404, {"error": f"nothing at {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _repo(self, name: str) -> Repo | None:
        if name not in self.hub.repos:
            self._answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return self.hub.repos.get(name)

    def _url(self) -> str:
        return f"http://{self.headers['Host']}"

    def who(self, body: bytes) -> None:
        self._answer(200, {"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        there = name in self.hub.repos
        self.hub.repos.setdefault(name, Repo(asked.get("visibility") == "private" or asked.get("private", False)))
        self._answer(409 if there else 200, {"url": f"{self._url()}/{name}", "name": name, "id": name})

    def valid(self, body: bytes) -> None:
        self._answer(200, {"errors": [], "warnings": []})

    def info(self, body: bytes, name: str) -> None:
        if repo := self._repo(name):
            files = [{"rfilename": file} for file in sorted(repo.files)]
            self._answer(
                200, {"_id": "1", "id": name, "modelId": name, "sha": repo.head, "siblings": files, "tags": []}
            )

    def tree(self, body: bytes, name: str) -> None:
        if repo := self._repo(name):
            files = [{"type": "file", "path": p, "size": len(c), "oid": _oid(c)} for p, c in sorted(repo.files.items())]
            self._answer(200, files)

    def preupload(self, body: bytes, name: str) -> None:
        files = json.loads(body)["files"]
        mode = lambda path: "lfs" if path.endswith((".safetensors", ".onnx")) else "regular"  # noqa: E731
        found = [{"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False} for f in files]
        self._answer(200, {"files": found})

    def batch(self, body: bytes, name: str) -> None:
        objects = []
        for asked in json.loads(body)["objects"]:
            place = {"href": f"{self._url()}/_large/{asked['oid']}"}
            actions = {} if asked["oid"] in self.hub.large else {"actions": {"upload": place}}
            objects.append({"oid": asked["oid"], "size": asked["size"], **actions})
        self._answer(200, {"transfer": "basic", "objects": objects})

    def large(self, body: bytes, oid: str) -> None:
        whole = hashlib.sha256(body).hexdigest() == oid
        if whole:
            self.hub.large[oid] = body
        self._answer(200 if whole else 400)

    def commit(self, body: bytes, name: str) -> None:
        if not (repo := self._repo(name)):
            return
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo.files[value["path"]] = self.hub.large[value["oid"]]
        repo.commits.append(_oid(body))
        self._answer(
            200, {"success": True, "commitOid": repo.head, "commitUrl": f"{self._url()}/{name}/commit/{repo.head}"}
        )

    def tag(self, body: bytes, name: str, revision: str) -> None:
        if repo := self._repo(name):
            repo.tags[json.loads(body)["tag"]] = revision
            self._answer(200)

    def resolve(self, body: bytes, name: str, file: str) -> None:
        if not (repo := self._repo(name)):
            return
        if file not in repo.files:
            self._answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            return
        content = repo.files[file]
        self._answer(200, raw=content, ETag=f'"{_oid(content)}"', X_Repo_Commit=repo.head)


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


_NAME = r"([^/]+/[^/]+)"
_ROUTES = [
    (r"/api/whoami-v2", _Handler.who),
    (r"/api/repos/create", _Handler.create),
    (r"/api/validate-yaml", _Handler.valid),
    (rf"/api/models/{_NAME}(?:/revision/[^/]+)?", _Handler.info),
    (rf"/api/models/{_NAME}/tree/.*", _Handler.tree),
    (rf"/api/models/{_NAME}/preupload/[^/]+", _Handler.preupload),
    (rf"/api/models/{_NAME}/commit/[^/]+", _Handler.commit),
    (rf"/api/models/{_NAME}/tag/([^/]+)", _Handler.tag),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"/_large/([0-9a-f]+)", _Handler.large),
    (rf"/{_NAME}/resolve/[^/]+/(.+)", _Handler.resolve),
]
