"""A hub on 127.0.0.1, and a plain file server, that misbehave on request.

Enough of the hub's protocol for the real client: HEAD and GET of
/ORG/NAME/resolve/REVISION/FILE with an ETag that is the content's sha256. A plain address is
/files/NAME.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c" * 40


@dataclass
class Hub:
    """What the server holds, how it misbehaves, and what it was asked.

    Attributes:
        files: path (`org/name/file` or `files/name`) -> content.
        published: path -> sha256 in the ETag, where it is not the content's.
        cut_once: path -> bytes after which the connection is dropped, the first time.
        fail_once: path -> status code of the first GET.
        garbage_once: paths whose first answer is no HTTP.
        chunked: paths whose length is not told; the end is.
        unsized: paths of which neither is told, so that a cut looks like the end.
        ignores_if_range: paths of which a part is sent also when the file has changed.
        kinds: path -> content type.
        slow: path -> seconds between chunks of 64 KiB.
        held: path -> what to wait for after the first of them.
        large: sha256 -> content that was sent through LFS.
        posts: paths that were posted to.
        ranges: path -> Range headers seen; None for a whole request.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    published: dict[str, str] = field(default_factory=dict)
    cut_once: dict[str, int] = field(default_factory=dict)
    fail_once: dict[str, int] = field(default_factory=dict)
    slow: dict[str, float] = field(default_factory=dict)
    held: dict[str, threading.Event] = field(default_factory=dict)
    garbage_once: set[str] = field(default_factory=set)
    chunked: set[str] = field(default_factory=set)
    unsized: set[str] = field(default_factory=set)
    ignores_if_range: set[str] = field(default_factory=set)
    kinds: dict[str, str] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    posts: list[str] = field(default_factory=list)
    ranges: dict[str, list[str | None]] = field(default_factory=lambda: defaultdict(list))

    def __enter__(self) -> Hub:
        hub = self

        class Handler(_Handler):
            state = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0].strip("/")
        parts = path.split("/")
        if len(parts) > 4 and parts[2] == "resolve":
            path = "/".join([*parts[:2], *parts[4:]])
        if body and path in self.state.fail_once:
            self._plain(self.state.fail_once.pop(path))
            return
        if body and path in self.state.garbage_once:
            self.state.garbage_once.remove(path)
            self.wfile.write(b"220 mail.example.org ESMTP\r\n")
            self.close_connection = True
            return
        content = self.state.files.get(path)
        if content is None:
            known = any(key.startswith("/".join(parts[:2]) + "/") for key in self.state.files)
            self._plain(404, "EntryNotFound" if known else "RepoNotFound")
            return
        self._send(path, content, body=body)

    def do_POST(self) -> None:
        """Making a repository and committing files to it, large ones through LFS."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        self.state.posts.append(path)
        if path == "/api/repos/create":
            name = json.loads(body)
            repo = "/".join(filter(None, (name.get("organization"), name["name"])))
            self._json({"url": f"{self.state.address}/{repo}", "name": repo})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in files}
            answer = [
                {"path": name, "uploadMode": mode, "shouldIgnore": False}
                for name, mode in modes.items()
            ]
            self._json({"files": answer})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for one in objects:
                href = f"{self.state.address}/lfs/{one['oid']}"
                one["actions"] = {"upload": {"href": href, "header": {}}}
            self._json({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            self._commit("/".join(path.split("/")[3:5]), body)
        else:
            self._plain(404)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.state.large[hashlib.sha256(body).hexdigest()] = body
        self._plain(200)

    def _commit(self, repo: str, body: bytes) -> None:
        for line in filter(None, body.splitlines()):
            step = json.loads(line)
            value = step["value"]
            if step["key"] == "file":
                self.state.files[f"{repo}/{value['path']}"] = base64.b64decode(value["content"])
            elif step["key"] == "lfsFile":
                self.state.files[f"{repo}/{value['path']}"] = self.state.large[value["oid"]]
        address = f"{self.state.address}/{repo}/commit/{COMMIT}"
        self._json({"success": True, "commitOid": COMMIT, "commitUrl": address})

    def _json(self, answer: dict) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _plain(self, status: int, code: str | None = None) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, path: str, content: bytes, *, body: bool) -> None:
        start = 0
        asked = self.headers.get("Range")
        etag = self.state.published.get(path, hashlib.sha256(content).hexdigest())
        changed = self.headers.get("If-Range") not in (None, f'"{etag}"')
        changed = changed and path not in self.state.ignores_if_range
        if asked and not changed:
            start = int(asked.removeprefix("bytes=").split("-")[0])
        if body:
            self.state.ranges[path].append(asked)
        if asked and not changed and start >= len(content):
            self._plain(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Type", self.state.kinds.get(path, "application/octet-stream"))
        if path in self.state.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif path in self.state.unsized:
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if body:
            self._stream(path, content[start:])

    def _stream(self, path: str, content: bytes) -> None:
        cut = self.state.cut_once.pop(path, None)
        content = content if cut is None else content[:cut]
        chunked = path in self.state.chunked
        try:
            for i in range(0, len(content), 1 << 16):
                piece = content[i : i + (1 << 16)]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
                time.sleep(self.state.slow.get(path, 0))
                if path in self.state.held:
                    self.state.held[path].wait(120)
            if chunked and cut is None:
                self.wfile.write(b"0\r\n\r\n")
            if cut is not None:
                self.close_connection = True
                self.connection.close()
        except OSError:
            self.close_connection = True
