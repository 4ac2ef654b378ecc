"""A server on this machine that answers as the models' hub does."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from tests.tiny_model import sha256

COMMIT = "1234567890abcdef1234567890abcdef12345678"
_SLICE_BYTES = 1 << 20


@dataclass
class Hub:
    """Repositories by id, and how the server misbehaves."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)  # what it says instead of the true sha256
    broken_downloads: int = 0  # that many answers stop in the middle
    pause_s: float = 0.0  # between the megabytes of a slow file
    slow: str = ".safetensors"  # how the names of slow files end
    sent: list[str] = field(default_factory=list)  # the files with weights that it began to send
    sent_bytes: int = 0  # of slow files
    log: list[str] = field(default_factory=list)
    endpoint: str = ""

    def files(self, hub_id: str) -> list[dict[str, object]]:
        listing: list[dict[str, object]] = []
        for name, content in self.repositories[hub_id].items():
            entry: dict[str, object] = {"rfilename": name, "path": name, "type": "file", "size": len(content)}
            entry["oid"] = entry["blobId"] = sha256(content)[:40]
            if name.endswith((".safetensors", ".bin")):
                digest = self.digests.get(name, sha256(content))
                entry["lfs"] = {"sha256": digest, "oid": digest, "size": len(content), "pointerSize": 130}
            listing.append(entry)
        return listing


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        self.hub.log.append(format % args)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        parts = urlsplit(self.path).path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        hub_id = "/".join(parts[2:4] if api else parts[:2])
        if hub_id == "org/gated":
            self._send(403, b"", {"X-Error-Code": "GatedRepo"}, body)
        elif hub_id not in self.hub.repositories:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
        elif api and parts[4:5] == ["tree"]:
            self._send(200, json.dumps(self.hub.files(hub_id)).encode(), {}, body)
        elif api:
            info = {"id": hub_id, "sha": COMMIT, "siblings": self.hub.files(hub_id), "tags": ["license:mit", "en"]}
            self._send(200, json.dumps(info).encode(), {}, body)
        else:
            self._send_file(hub_id, "/".join(parts[4:]), body)

    def _send_file(self, hub_id: str, name: str, body: bool) -> None:
        content = self.hub.repositories[hub_id][name]
        headers = {"ETag": f'"{sha256(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if body and name.endswith(".safetensors"):
            self.hub.sent.append(name)
        if body and self.hub.broken_downloads and name.endswith(".safetensors"):
            self.hub.broken_downloads -= 1
            self._send(200, content, headers, body, cut=len(content) // 2)
        elif start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self._send(206, content[start:], headers, body)
        else:
            self._send(200, content, headers, body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body and self.hub.pause_s and self.path.endswith(self.hub.slow):
            self._send_slowly(content)
        elif body:
            self.wfile.write(content[:cut])
        if cut is not None:
            self.close_connection = True

    def _send_slowly(self, content: bytes) -> None:
        try:
            for first in range(0, len(content), _SLICE_BYTES):
                self.wfile.write(content[first : first + _SLICE_BYTES])
                self.hub.sent_bytes += len(content[first : first + _SLICE_BYTES])
                time.sleep(self.hub.pause_s)
        except OSError:  # whoever fetched it is gone
            self.close_connection = True


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Have a hub answer on a port of its own."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def environment_of(hub: Hub, cache: Path) -> dict[str, str]:
    """What has a process fetch from it: its address, and a cache of its own."""
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(cache),
        "HF_HUB_CACHE": str(cache / "hub"),
    }
