"""A data set repository that speaks the part of the Hugging Face hub's protocol that downloads use, on loopback."""

import hashlib
import json
import re
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

REPOSITORY = "altoslabs/perturbench"
FIRST, SECOND = "a" * 40, "b" * 40
# Bytes that a download takes at once.
CHUNK = 4096


class Request(NamedTuple):
    """What the server was asked, and how many bytes of a file it gave."""

    method: str
    path: str
    range: str | None
    authorization: str | None
    encoding: str | None
    sent: int = 0


class FakeHub:
    """The repository ``altoslabs/perturbench``: files by commit, and the faults to show.

    Files in ``lfs`` are listed with their SHA-256 and answered by a redirect to another host name, as the hub does
    with its storage; the others by git's blob id, directly.
    """

    def __init__(self):
        self.commits: dict[str, dict[str, bytes]] = {FIRST: {}}
        self.main = FIRST
        self.repository = REPOSITORY
        self.lfs_suffixes = (".gz",)
        self.requests: list[Request] = []
        self.served: dict[str, bytes] = {}
        """Bytes given in place of those that the list of files promises."""
        self.cuts: dict[str, list[int]] = {}
        """For each coming answer of a file, after how many of its bytes the connection breaks."""
        self.reset = False
        """Break by a reset instead of an early end."""
        self.stall: dict[str, int] = {}
        """After how many bytes of a file to wait for `go`."""
        self.go = threading.Event()
        self.status: dict[str, int] = {}
        """Statuses to answer with, by the beginning of the path."""
        self.api_answer: bytes | None = None
        """Answer of the API in place of the list of files."""
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.main]

    def close(self) -> None:
        self.go.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def of_file(self, name: str) -> list[Request]:
        """Requests that were to bring bytes of a file."""
        return [r for r in self.requests if r.path.endswith(f"/{name}") and r.sent]

    def info(self, revision: str) -> dict:
        """What the hub's API says of a revision."""
        siblings = []
        for name, content in self.commits[revision].items():
            entry = {"rfilename": name, "size": len(content), "blobId": git_blob(content)}
            if name.endswith(self.lfs_suffixes):
                entry["blobId"] = git_blob(b"pointer to " + name.encode())
                entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        return {"id": REPOSITORY, "sha": revision, "private": False, "tags": [], "siblings": siblings}

    def _handler(hub):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments):
                pass

            def do_GET(self):
                self.answer()

            def do_HEAD(self):
                self.answer()

            def answer(self):
                url = urlsplit(self.path)
                hub.requests.append(
                    Request(
                        self.command,
                        url.path,
                        self.headers["Range"],
                        self.headers["Authorization"],
                        self.headers["Accept-Encoding"],
                    )
                )
                number = len(hub.requests) - 1
                for start, status in hub.status.items():
                    if url.path.startswith(start):
                        return self.reply(status, b"no")
                if match := re.fullmatch(f"/api/datasets/{hub.repository}/revision/(.+)", url.path):
                    assert parse_qs(url.query.lower()) == {"blobs": ["true"]}
                    revision = hub.main if match[1] == "main" else match[1]
                    if revision not in hub.commits:
                        return self.reply(404, b"no", {"X-Error-Code": "RevisionNotFound"})
                    body = hub.api_answer or json.dumps(hub.info(revision)).encode()
                    return self.reply(200, body, {"Content-Type": "application/json"})
                if match := re.fullmatch(f"/(cdn|datasets/{hub.repository}/resolve)/([0-9a-f]+)/(.+)", url.path):
                    place, revision, name = match.groups()
                    content = hub.commits.get(revision, {}).get(name)
                    if content is None:
                        return self.reply(404, b"no", {"X-Error-Code": "EntryNotFound"})
                    if place != "cdn" and name.endswith(hub.lfs_suffixes):
                        location = f"http://localhost:{hub.server.server_port}/cdn/{revision}/{name}"
                        return self.reply(302, b"", {"Location": location, "X-Repo-Commit": revision})
                    return self.give(number, name, hub.served.get(name, content))
                return self.reply(404, b"no", {"X-Error-Code": "RepoNotFound"})

            def give(self, number, name, content):
                """A file or, asked with a Range, the end of it; broken where the hub is told to break it."""
                start, headers = 0, {"Accept-Ranges": "bytes", "ETag": f'"{git_blob(content)}"'}
                if asked := self.headers["Range"]:
                    start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
                    headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                self.begin(206 if asked else 200, len(content) - start, headers)
                if self.command == "HEAD":
                    return
                end = len(content)
                cut = hub.cuts[name].pop(0) if hub.cuts.get(name) else None
                if cut is not None:
                    end = min(end, max(start, cut))
                if name in hub.stall:
                    self.wfile.write(content[start : hub.stall[name]])
                    hub.requests[number] = hub.requests[number]._replace(sent=hub.stall[name] - start)
                    hub.go.wait()
                    self.close_connection = True
                    return
                hub.requests[number] = hub.requests[number]._replace(sent=end - start)
                self.wfile.write(content[start:end])
                if cut is not None:
                    self.close_connection = True
                    if hub.reset:
                        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        self.connection.close()

            def reply(self, status, body, headers=None):
                self.begin(status, len(body), headers or {})
                if self.command != "HEAD":
                    self.wfile.write(body)

            def begin(self, status, length, headers):
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(length)}.items():
                    self.send_header(name, value)
                self.end_headers()

        return Handler


def git_blob(content: bytes) -> str:
    """Name that git gives to a file's content."""
    return hashlib.sha1(b"blob " + str(len(content)).encode() + b"\0" + content).hexdigest()
