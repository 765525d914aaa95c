"""A stand-in for Hugging Face: the part of its HTTP interface that uploads and downloads models."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

PATH = r"/api/models/([^/]+/[^/]+)(/.*)?|/([^/]+/[^/]+)/resolve/\w+/(.+)"
"""(repository, action) of the interface, or (repository, file)."""

COMMIT = "0" * 40


class HubServer(ThreadingHTTPServer):
    """Repositories in memory; each has its files, and whether it is private or gated."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def answer(self, status: int, content: Any = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refused(self, repo: str) -> bool:
        """Answer as Hugging Face does where a repository is missing, private or gated."""
        if repo in self.server.gated:
            self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        elif repo not in self.server.files or (
            repo in self.server.private and "Authorization" not in self.headers
        ):
            self.answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository Not Found")
        else:
            return False
        return True

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        match re.fullmatch(
            r"/api/models/([^/]+/[^/]+)(/.*)?|/([^/]+/[^/]+)/resolve/\w+/(.+)", path
        ):
            case None:
                self.answer(404)
            case found if self.refused(repo := found[1] or found[3]):
                pass
            case found if found[3]:
                self.send_file(self.server.files[repo].get(found[4]), found[4])
            case found if (found[2] or "").startswith("/tree"):
                self.answer(200, [self.entry(repo, name) for name in self.server.files[repo]])
            case _:
                names = [{"rfilename": name} for name in self.server.files[repo]]
                info = {"id": repo, "sha": COMMIT, "private": repo in self.server.private}
                self.answer(200, {**info, "siblings": names})

    def entry(self, repo: str, name: str) -> dict[str, Any]:
        content = self.server.files[repo][name]
        oid = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": name, "size": len(content), "oid": oid}

    def send_file(self, content: bytes | None, name: str) -> None:
        if content is None:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Error_Message=name)
        etag = hashlib.sha1(content).hexdigest()
        return self.answer(200, content, ETag=f'"{etag}"', X_Repo_Commit=COMMIT)

    def do_POST(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/validate-yaml":  # the metadata of a model card
            return self.answer(200, {"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            options = json.loads(body)
            repo = "/".join(filter(None, (options.get("organization"), options["name"])))
            if repo in self.server.files:
                return self.answer(409, {"error": "exists", "url": f"{self.server.url}/{repo}"})
            if "Authorization" not in self.headers:
                return self.answer(401, {"error": "Invalid username or password."})
            self.server.files[repo] = {".gitattributes": b""}
            if options.get("private") or options.get("visibility") == "private":
                self.server.private.add(repo)
            return self.answer(200, {"url": f"{self.server.url}/{repo}"})
        repo, _, action = self.path.removeprefix("/api/models/").rpartition("/")[0].rpartition("/")
        if self.refused(repo):
            return None
        if action == "preupload":
            files = json.loads(body)["files"]
            answers = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
            ]
            return self.answer(200, {"files": answers})
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.server.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del self.server.files[repo][value["path"]]
        url = f"{self.server.url}/{repo}/commit/main"
        return self.answer(200, {"commitUrl": url, "commitOid": COMMIT})


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """Run a `HubServer` in a thread."""
    with HubServer() as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
