"""A model hub on this machine: the few answers of the real one's API that fetching needs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

GATED, BROKEN, SECRET = "tiny/gated", "tiny/broken", "hf_opens_the_gate"


@dataclass
class Hub:
    """`revisions` are the folders of each repository by branch, tag or commit."""

    url: str = ""
    revisions: dict[str, dict[str, Path]] = field(default_factory=dict)
    fetched: list[str] = field(default_factory=list)  # repository/file of each download

    def publish(self, name: str, folder: Path, revision: str = "main") -> str:
        """Serve `folder` as `revision`; returns its commit."""
        state = [f"{p.relative_to(folder)} {p.stat().st_mtime_ns}" for p in folder.rglob("*")]
        commit = hashlib.sha1("\n".join([name, *sorted(state)]).encode()).hexdigest()
        self.revisions.setdefault(name, {}).update({revision: folder, commit: folder})
        return commit

    def commit(self, name: str, revision: str) -> str:
        """The commit of a branch or tag: the 40 digits that have the same folder."""
        known = self.revisions[name]
        return next(c for c, f in known.items() if len(c) == 40 and f == known[revision])


def answer(hub: Hub, path: str, token: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body."""
    parts = unquote(urlsplit(path).path).strip("/").split("/")
    api = parts[:2] == ["api", "models"]
    owner, repository, *rest = parts[2:] if api else parts
    name = f"{owner}/{repository}"
    if name == BROKEN:
        return 503, {}, b"<html>down for maintenance</html>"
    if name not in hub.revisions:  # as the real one says it to those who are not logged in
        return 401, {"X-Error-Code": "RepoNotFound"}, b"{}"
    revision = rest[1] if rest else "main"
    if revision not in hub.revisions[name]:
        return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
    folder, commit = hub.revisions[name][revision], hub.commit(name, revision)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    named = [path.relative_to(folder).as_posix() for path in files]
    if api and rest[:1] == ["tree"]:
        tree = [
            {"type": "file", "path": n, "size": p.stat().st_size, "oid": etag(p)}
            for n, p in zip(named, files, strict=True)
        ]
        return 200, {}, json.dumps(tree).encode()
    if api:
        info = {"id": name, "sha": commit, "siblings": [{"rfilename": n} for n in named]}
        return 200, {}, json.dumps(info).encode()
    if name == GATED and token != f"Bearer {SECRET}":
        return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
    file = "/".join(rest[2:])
    if file not in named:
        return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"
    found = folder / file
    headers = {"X-Repo-Commit": commit, "ETag": f'"{etag(found)}"'}
    return 200, headers, found.read_bytes()


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """A hub that listens on a port of its own, without a repository."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.respond(body=False)

        def do_GET(self) -> None:
            self.respond(body=True)

        def respond(self, body: bool) -> None:
            token = self.headers.get("Authorization", "")
            status, headers, content = answer(hub, self.path, token)
            if body and status == 200 and "/resolve/" in self.path:
                hub.fetched.append(
                    self.path.split("/resolve/")[0][1:] + "/" + self.path[-200:].rpartition("/")[2]
                )
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
