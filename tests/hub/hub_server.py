"""A stand-in for the HTTP endpoint of the Hub: repositories, branches, both kinds of upload."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_test"


@dataclass
class Repo:
    settings: dict[str, Any]
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    messages: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """What the server holds. `requests` is every `(method, path)` that came."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    garbled: dict[tuple[str, str], bytes] = field(default_factory=dict)  # (repo, of path) -> answer

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        parts = [unquote(part) for part in path.strip("/").split("/")]
        match method, parts:
            case "POST", ["api", "repos", "create"]:
                return self._create(json.loads(body))
            case "POST", ["api", "validate-yaml"]:
                return 200, {"warnings": [], "errors": []}
            case "POST", ["api", "models", user, name, "branch", branch]:
                branches = self.repos[f"{user}/{name}"].branches
                if branch in branches:
                    return 409, {"error": "the branch exists"}
                branches[branch] = dict(branches["main"])
                return 200, {}
            case "POST", ["api", "models", user, name, "preupload", branch]:
                if branch not in self.repos[f"{user}/{name}"].branches:
                    return 404, {"error": "no such branch"}
                files = json.loads(body)["files"]
                return 200, {"files": [self._mode(file) for file in files]}
            case "POST", [user, _, "info", "lfs", "objects", "batch"]:
                objects = json.loads(body)["objects"]
                return 200, {"transfer": "basic", "objects": [self._batch(o) for o in objects]}
            case "PUT", ["blob", oid]:
                if hashlib.sha256(body).hexdigest() != oid:
                    return 400, {"error": "damaged on the way"}
                self.blobs[oid] = body
                return 200, {}
            case "GET" | "HEAD", [user, name, "resolve", branch, *path]:
                branches = self.repos[f"{user}/{name}"].branches
                content = branches.get(branch, {}).get("/".join(path))
                return (404, {"error": "no such file"}) if content is None else (200, content)
            case "POST", ["api", "models", user, name, "commit", branch]:
                return self._commit(f"{user}/{name}", branch, body)
        return 404, {"error": f"{method} {path} is not part of the stand-in"}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        known = name in self.repos
        if not known:
            self.repos[name] = Repo(asked)
        return 409 if known else 200, {"url": f"{self.url}/{name}"}

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        binary = b"\0" in base64.b64decode(file["sample"])
        mode = "lfs" if binary else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}

    def _batch(self, blob: dict[str, Any]) -> dict[str, Any]:
        upload = {"href": f"{self.url}/blob/{blob['oid']}"}
        return {**blob, "actions": {"upload": upload}}

    def _commit(self, name: str, branch: str, body: bytes) -> tuple[int, Any]:
        repo = self.repos[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repo.messages.append(value["summary"])
            elif line["key"] == "file":
                content = base64.b64decode(value["content"])
                repo.branches[branch][value["path"]] = content
            else:
                assert line["key"] == "lfsFile" and value["algo"] == "sha256"
                repo.branches[branch][value["path"]] = self.blobs[value["oid"]]
        oid = f"{len(repo.messages):040x}"
        url = f"{self.url}/{name}/commit/{oid}"
        return 200, {"commitUrl": url, "commitOid": oid, "success": True}


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = urlsplit(self.path).path
            hub.requests.append((self.command, path))
            authorised = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            if authorised or path.startswith("/blob/"):
                status, content = hub.answer(self.command, path, body)
            else:
                status, content = 401, {"error": "Invalid username or password."}
            for (repo, part), answer in hub.garbled.items():
                if part in path and repo in f"{path} {body!r}":
                    status, content = 200, answer
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            if "/resolve/" in path:
                self.send_header("X-Repo-Commit", f"{1:040x}")
                self.send_header("ETag", hashlib.sha256(data).hexdigest())
                if status == 404:
                    self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_HEAD = do

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
