"""A Hub in memory: enough of its HTTP interface to create a repository, commit to it, and load from it.

Only what ``huggingface_hub`` calls for a push (create, check of a card, preupload, LFS upload, commit) and for a load (info,
tree, resolve). Models and Spaces are kept apart, as there: a Space is ``repos["spaces/owner/name"]``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fake_card_rules import SDKS, complaints

LFS = (".safetensors", ".png", ".bin")
REPO = r"(models|spaces)/([\w.-]+/[\w.-]+)"


@dataclass
class Repo:
    """Files of the newest commit, and how many commits there were."""

    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(self.commits).encode()).hexdigest()


class FakeHub:
    """The server and what it holds: ``repos`` by id, ``blobs`` by SHA-256."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def environment(self, cache: str) -> dict[str, str]:
        """What a process needs to take this for the Hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": "hf_nothing",
            "HF_HOME": cache,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def write(self, name: str, folder: Path) -> Path:
        """The files of a repository, as a clone of it has them."""
        for path, data in self.repos[name].files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        return folder


@contextmanager
def running() -> Iterator[FakeHub]:
    """A Hub that answers until the block ends."""
    hub = FakeHub()
    thread = threading.Thread(target=hub.server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server_hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Stay quiet."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.server_hub, self.path.split("?")[0]
        hub.requests.append(f"{self.command} {path}")
        if found := re.fullmatch(r"/((?:spaces/)?[\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(found[1], found[2], found[3])
        if found := re.fullmatch(rf"/api/{REPO}(?:/revision/[^/]+)?", path):
            return self._info(_key(found[1], found[2]), found[2])
        if found := re.fullmatch(rf"/api/{REPO}/tree/[^/]+(?:/(.*))?", path):
            return self._tree(_key(found[1], found[2]), found[3] or "")
        return self._answer(404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound"})

    def do_POST(self) -> None:
        hub, path = self.server_hub, self.path.split("?")[0]
        hub.requests.append(f"POST {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            asked = json.loads(body)
            errors, warnings = complaints(asked["content"], asked.get("repoType") or "model")
            said = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
            return self._answer(400 if errors else 200, said)
        if found := re.fullmatch(rf"/api/{REPO}/preupload/[^/]+", path):
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": self._mode(f["path"]), "shouldIgnore": False} for f in files]
            return self._answer(200, {"files": modes})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._answer(200, self._lfs(json.loads(body)), kind="application/vnd.git-lfs+json")
        if found := re.fullmatch(rf"/api/{REPO}/commit/[^/]+", path):
            return self._commit(_key(found[1], found[2]), body)
        return self._answer(404, {"error": "not found"})

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server_hub.blobs[self.path.rsplit("/", 1)[1]] = body
        self._answer(200, {})

    def _create(self, asked: dict[str, Any]) -> None:
        hub, kind = self.server_hub, asked.get("type") or "model"
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if kind == "space" and asked.get("sdk") not in SDKS:
            return self._answer(400, {"error": "a Space needs an sdk"})
        key = _key(f"{kind}s", name)
        there = key in hub.repos
        hub.repos.setdefault(key, Repo())
        return self._answer(409 if there else 200, {"url": f"{hub.url}/{key}", "name": name, "id": name})

    def _mode(self, path: str) -> str:
        return "lfs" if path.endswith(LFS) else "regular"

    def _lfs(self, asked: dict[str, Any]) -> dict[str, Any]:
        url = self.server_hub.url
        objects = [
            {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{url}/blob/{o['oid']}"}}}
            for o in asked["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    def _commit(self, name: str, body: bytes) -> None:
        repo = self.server_hub.repos[name]
        lines = list(map(json.loads, body.decode().splitlines()))
        gone = [line["value"]["path"] for line in lines if line["key"] == "deletedFile"]
        if missing := [path for path in gone if path not in repo.files]:
            return self._answer(404, {"error": f"{missing[0]}: a file with this name doesn't exist"})
        for path in gone:
            del repo.files[path]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo.files[value["path"]] = self.server_hub.blobs[value["oid"]]
        repo.commits += 1
        url = f"{self.server_hub.url}/{name}/commit/{repo.sha}"
        return self._answer(200, {"success": True, "commitOid": repo.sha, "commitUrl": url})

    def _info(self, key: str, name: str) -> None:
        repo = self.server_hub.repos.get(key)
        if repo is None:
            return self._answer(404, {"error": "no repository"}, {"X-Error-Code": "RepoNotFound"})
        siblings = [{"rfilename": path, **self._size(path, data)} for path, data in sorted(repo.files.items())]
        return self._answer(200, {"id": name, "modelId": name, "sha": repo.sha, "siblings": siblings, "tags": []})

    def _size(self, path: str, data: bytes) -> dict[str, Any]:
        found: dict[str, Any] = {"size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
        if self._mode(path) == "lfs":
            found["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return found

    def _tree(self, name: str, folder: str) -> None:
        repo = self.server_hub.repos.get(name)
        files = {p: d for p, d in repo.files.items() if p.startswith(folder)} if repo is not None else {}
        if repo is None or (folder and not files):
            return self._answer(404, {"error": "no folder"}, {"X-Error-Code": "EntryNotFound"})
        rows = [
            {"type": "file", "path": p, "oid": hashlib.sha1(d).hexdigest(), "size": len(d)} for p, d in files.items()
        ]
        return self._answer(200, rows)

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repo = self.server_hub.repos.get(name)
        if repo is None:
            return self._answer(404, {"error": "no repository"}, {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", repo.sha):
            return self._answer(404, {"error": "no revision"}, {"X-Error-Code": "RevisionNotFound"})
        if path not in repo.files:
            return self._answer(
                404, {"error": "no file"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repo.sha}
            )
        data = repo.files[path]
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        headers = {"X-Repo-Commit": repo.sha, "ETag": etag, "X-Linked-Etag": etag, "X-Linked-Size": str(len(data))}
        return self._answer(200, data, headers, kind="application/octet-stream")

    def _answer(
        self, status: int, body: Any, headers: dict[str, str] | None = None, kind: str = "application/json"
    ) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _key(kind: str, name: str) -> str:
    """Where a repository is kept: Spaces have names of their own."""
    return name if kind == "models" else f"{kind}/{name}"
