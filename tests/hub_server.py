"""A server on this machine that speaks as much of the Hugging Face Hub as downloads need, and fails as it is told.

Paths and headers are those of https://huggingface.co/docs/hub/api and of its downloads (ETag, X-Repo-Commit, Range).
"""

import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

PAGE = 3


@dataclass
class Fault:
    """What happens to ``times`` requests of a method whose path contains ``part``, after ``passed`` of them."""

    method: str
    part: str
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    break_after: int | None = None
    times: int = 1
    passed: int = 0


def blob_id(data: bytes) -> str:
    """Git's name for a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def send_library_to(url: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's library asks the server at ``url``, keeps its cache in ``folder``, and knows no token and no proxy."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    for name in ("http_proxy", "https_proxy", "all_proxy", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    huggingface_hub.close_session()


class HubServer:
    """Serves the commits that are pushed to it, and counts the bytes of each file that it sent."""

    def __init__(self):
        self.repositories: dict[str, dict[str, str]] = {}
        self.commits: dict[str, dict[str, bytes]] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.sent: Counter[str] = Counter()
        self.tokens: list[str | None] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def push(self, dataset: str, files: dict[str, bytes], branch: str = "main") -> str:
        """A new commit at the head of a branch, with these files; returns its name."""
        listed = json.dumps(sorted((name, blob_id(data)) for name, data in files.items()))
        commit = hashlib.sha1(f"{dataset} {listed}".encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.repositories.setdefault(dataset, {})[branch] = commit
        return commit

    def fault_for(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and fault.method == method and fault.part in path:
                if fault.passed:
                    fault.passed -= 1
                    continue
                fault.times -= 1
                return fault
        return None

    def _handler(hub):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                self.answer("HEAD")

            def do_GET(self):
                self.answer("GET")

            def answer(self, method: str) -> None:
                url = urlsplit(self.path)
                hub.requests.append(f"{method} {unquote(url.path)}")
                hub.tokens.append(self.headers.get("Authorization"))
                fault = hub.fault_for(method, unquote(url.path))
                if fault and fault.status != 200:
                    return self.reply(fault.status, b"{}", fault.headers)
                match = re.fullmatch(r"/(api/)?datasets/([^/]+/[^/]+)/(revision|tree|resolve)/([^/]+)/?(.*)", url.path)
                if not match or match[2] not in hub.repositories:
                    return self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
                _, dataset, verb, revision, name = match.groups()
                commit = hub.repositories[dataset].get(unquote(revision), unquote(revision))
                if commit not in hub.commits:
                    return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                files = hub.commits[commit]
                if verb == "revision":
                    self.reply(200, json.dumps({"id": dataset, "sha": commit, "siblings": []}).encode())
                elif verb == "tree":
                    self.tree(files, url, parse_qs(url.query))
                elif unquote(name) not in files:
                    headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
                    self.reply(404, b"{}", headers)
                else:
                    self.file(method, unquote(name), files[unquote(name)], commit, fault)

            def tree(self, files: dict[str, bytes], url, query) -> None:
                """A page of the listing, folders and files in the order of their paths."""
                folders = {str(folder) for name in files for folder in PurePosixPath(name).parents} - {"."}
                entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": folder} for folder in folders]
                entries += [
                    {"type": "file", "oid": blob_id(data), "size": len(data), "path": name}
                    for name, data in files.items()
                ]
                entries.sort(key=lambda entry: entry["path"])
                first = int(query.get("cursor", ["0"])[0])
                headers = {}
                if first + PAGE < len(entries):
                    link = f"{hub.url}{url.path}?recursive=True&expand=False&cursor={first + PAGE}"
                    headers["Link"] = f'<{link}>; rel="next"'
                self.reply(200, json.dumps(entries[first : first + PAGE]).encode(), headers)

            def file(self, method: str, name: str, data: bytes, commit: str, fault: Fault | None) -> None:
                headers = {"ETag": f'"{blob_id(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
                status, start = 200, 0
                if asked := self.headers.get("Range"):
                    hub.ranges.append(asked)
                    status, start = 206, int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
                    headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                body = data[start:]
                if method == "HEAD":
                    return self.reply(status, body, headers, send=0)
                send = len(body) if fault is None or fault.break_after is None else fault.break_after
                hub.sent[name] += send
                self.reply(status, body, headers, send)

            def reply(self, status: int, body: bytes, headers: dict | None = None, send: int | None = None) -> None:
                """An answer with this body, or with only its first bytes and the end of the connection."""
                self.send_response(status)
                for key, value in (headers or {}).items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "HEAD":
                    return
                self.wfile.write(body if send is None else body[:send])
                if send is not None and send < len(body):
                    self.close_connection = True

        return Handler
