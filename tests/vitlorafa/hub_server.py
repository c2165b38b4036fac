"""A local stand-in for the Hugging Face hub, which the real client talks to: repositories of models in memory."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_local"


class Hub:
    """Attributes:
    repos: Files of each repository by name.
    commits: Titles of all commits.
    requests: Requests as "METHOD path".
    """

    def __init__(self):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.commits: list[str] = []
        self.requests: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    @contextlib.contextmanager
    def running(self):
        thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.server.shutdown()
            thread.join()
            self.server.server_close()

    def sha(self, repo):
        return hashlib.sha1(json.dumps({k: v.hex() for k, v in sorted(self.repos[repo].items())}).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def answer(self, content, status=200, headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if match := re.fullmatch(r"/api/models/([\w-]+/[\w-]+)(?:/revision/\w+)?", path):
            if (repo := match[1]) not in self.hub.repos:
                return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            siblings = [{"rfilename": name} for name in self.hub.repos[repo]]
            return self.answer({"id": repo, "sha": self.hub.sha(repo), "siblings": siblings, "private": False})
        if match := re.fullmatch(r"/api/models/([\w-]+/[\w-]+)/tree/\w+", path):
            files = self.hub.repos[match[1]].items()
            return self.answer(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files
                ]
            )
        if match := re.fullmatch(r"/([\w-]+/[\w-]+)/resolve/\w+/(.+)", path):
            data = self.hub.repos[match[1]][match[2]]
            return self.answer(
                data, headers={"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": self.hub.sha(match[1])}
            )
        return self.answer({"error": f"unexpected GET {path}"}, 400)

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"POST {path}")
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else self._read_chunks()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            said = json.loads(body)
            repo = f"{said.get('organization', 'you')}/{said['name']}"
            if repo in self.hub.repos:
                return self.answer({"url": f"{self.hub.url}/{repo}"}, 409)
            self.hub.repos[repo] = {".gitattributes": b""}
            return self.answer({"url": f"{self.hub.url}/{repo}", "id": repo, "name": repo})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/models/([\w-]+/[\w-]+)/preupload/\w+", path):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if match := re.fullmatch(r"/api/models/([\w-]+/[\w-]+)/commit/\w+", path):
            repo = self.hub.repos[match[1]]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    self.hub.commits.append(value["summary"])
                elif line["key"] == "file":
                    repo[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    del repo[value["path"]]
            sha = self.hub.sha(match[1])
            return self.answer({"commitUrl": f"{self.hub.url}/{match[1]}/commit/{sha}", "commitOid": sha})
        return self.answer({"error": f"unexpected POST {path}"}, 400)

    def _read_chunks(self):
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body
