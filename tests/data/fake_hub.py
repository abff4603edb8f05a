"""A data set repository on loopback that speaks the part of the Hugging Face hub's protocol that downloads use."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

REPOSITORY = "altoslabs/perturbench"
FIRST, SECOND = "a" * 40, "b" * 40


class FakeHub:
    """The repository ``altoslabs/perturbench``: files by commit, and the faults to simulate.

    As on the hub, large files (``.gz``) are listed with their SHA-256 and the others with the name of their git blob.
    """

    def __init__(self):
        self.commits: dict[str, dict[str, bytes]] = {FIRST: {}}
        self.main = FIRST
        self.repository = REPOSITORY
        self.requests: list[tuple[str, str]] = []
        """Method and path of each request."""
        self.served: dict[str, bytes] = {}
        """Content to serve instead of what the list of files promises."""
        self.cuts: dict[str, int] = {}
        """Bytes of a file after which the connection breaks, every time."""
        self.status: dict[str, int] = {}
        """Statuses to answer with, by prefix of the path."""
        self.api_answer: bytes | None = None
        """Answer of the API instead of the list of files."""
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
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def downloads(self, name: str) -> int:
        """Number of requests for the content of a file."""
        return sum(method == "GET" and path.endswith(f"/{name}") for method, path in self.requests)

    def info(self, revision: str) -> dict:
        """Answer of the hub's API for a revision."""
        siblings = []
        for name, content in self.commits[revision].items():
            entry = {"rfilename": name, "size": len(content), "blobId": git_blob(content)}
            if name.endswith(".gz"):
                entry["blobId"] = git_blob(b"pointer to " + name.encode())
                entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        return {"id": REPOSITORY, "sha": revision, "private": False, "tags": [], "siblings": siblings}

    def _handler(hub):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments):
                pass

            def do_HEAD(self):
                self.do_GET()

            def do_GET(self):
                path = urlsplit(self.path).path
                hub.requests.append((self.command, path))
                for prefix, status in hub.status.items():
                    if path.startswith(prefix):
                        return self.reply(status, b"no")
                if match := re.fullmatch(f"/api/datasets/{hub.repository}/revision/(.+)", path):
                    revision = hub.main if match[1] == "main" else match[1]
                    if revision not in hub.commits:
                        return self.reply(404, b"no", {"X-Error-Code": "RevisionNotFound"})
                    body = hub.api_answer or json.dumps(hub.info(revision)).encode()
                    return self.reply(200, body, {"Content-Type": "application/json"})
                if match := re.fullmatch(f"/datasets/{hub.repository}/resolve/([0-9a-f]+)/(.+)", path):
                    revision, name = match.groups()
                    content = hub.served.get(name, hub.commits[revision][name])
                    headers = {"ETag": f'"{git_blob(content)}"', "X-Repo-Commit": revision}
                    return self.reply(200, content, headers, hub.cuts.get(name))
                return self.reply(404, b"no", {"X-Error-Code": "RepoNotFound"})

            def reply(self, status, body, headers=None, cut=None):
                self.send_response(status)
                for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body[:cut])
                    self.close_connection = cut is not None

        return Handler


def git_blob(content: bytes) -> str:
    """Name that git gives to the content of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
