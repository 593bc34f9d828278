"""A server that speaks as much of the hubs' interfaces as a download needs: Hugging Face's and ModelScope's."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server has, and what it was asked."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Content of each file by model and name."""
    gated: set[str] = field(default_factory=set)
    """Models that need the token `right`."""
    cut: dict[str, int] = field(default_factory=dict)
    """Bytes of a file after which the connection is cut, once."""
    stalled: dict[str, int] = field(default_factory=dict)
    """Bytes of a file after which nothing more is sent until `goes_on`, once."""
    goes_on: Event = field(default_factory=Event)
    damaged: set[str] = field(default_factory=set)
    """Files of which other bytes are sent than stated."""
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    """Name and Range of each file that was asked for."""
    address: str = ""


def is_large(name: str) -> bool:
    """Whether a file is stored by Git LFS, so that the hub states its sha256."""
    return name.endswith((".safetensors", ".bin"))


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve a hub on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Nothing is printed."""

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            path, query = unquote(url.path), parse_qs(url.query)
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
                self._hugging_face_listing(found[1], found[2] or "main")
            elif (found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)) and is_large(found[3]):
                self._json(302, {}, {"Location": f"{hub.address}/storage/{found[1]}/{found[3]}"})
            elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self._file(found[1], found[3])
            elif found := re.fullmatch(r"/storage/([^/]+/[^/]+)/(.+)", path):
                self._file(found[1], found[2])
            elif found := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo/files", path):
                self._model_scope_listing(found[1])
            elif found := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo", path):
                self._file(found[1], query["FilePath"][0])
            else:
                self._json(404, {})

        def _hugging_face_listing(self, model: str, revision: str) -> None:
            if model not in hub.files:
                self._json(401, {}, {"X-Error-Code": "RepoNotFound"})
            elif model in hub.gated and self.headers.get("Authorization") != "Bearer right":
                self._json(403, {}, {"X-Error-Code": "GatedRepo"})
            elif revision not in ("main", COMMIT):
                self._json(404, {}, {"X-Error-Code": "RevisionNotFound"})
            else:
                siblings = [self._sibling(name, content) for name, content in hub.files[model].items()]
                self._json(200, {"id": model, "sha": COMMIT, "siblings": siblings})

        def _sibling(self, name: str, content: bytes) -> dict[str, Any]:
            lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 100}
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            found = {"rfilename": name, "size": len(content), "blobId": blob}
            return {**found, "lfs": lfs} if is_large(name) else found

        def _model_scope_listing(self, model: str) -> None:
            if model not in hub.files:
                self._json(404, {"Code": 10010205001, "Message": "not found", "Success": False})
                return
            entries = [
                {"Path": name, "Size": len(content), "Sha256": hashlib.sha256(content).hexdigest(), "Type": "blob"}
                for name, content in hub.files[model].items()
            ]
            self._json(200, {"Code": 200, "Data": {"Files": entries}, "Success": True})

        def _file(self, model: str, name: str) -> None:
            content = hub.files[model][name]
            if name in hub.damaged:
                content = bytes(len(content))
            asked = self.headers.get("Range")
            hub.asked.append((name, asked))
            start = int(re.findall(r"\d+", asked)[0]) if asked else 0
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            if self.command == "HEAD":
                return
            stalled = hub.stalled.pop(name, None)
            if stalled is not None:
                self.wfile.write(content[start:stalled])
                self.wfile.flush()
                hub.goes_on.wait(60)
                self.close_connection = True
                return
            end = hub.cut.pop(name, None)
            self.wfile.write(content[start:end])
            if end is not None:
                self.close_connection = True

        def _json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            for key, text in {**(headers or {}), "Content-Type": "application/json"}.items():
                self.send_header(key, text)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
