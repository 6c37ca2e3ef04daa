"""A hub on the loopback interface: enough of the Hugging Face hub's API for the libraries to load from it.

HF_ENDPOINT points every library at it. A repository is a folder on disk; a state makes it gated, down, slow, or break off or
damage what it sends.
"""

import hashlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def is_large(path):
    """Whether the hub would keep a file outside git and know it by its sha256."""
    return path.suffix == ".safetensors"


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def git_hash(path):
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """A running server. `repos` maps ("models" | "datasets", id) to a folder; `states` maps the same to a way to fail."""

    def __init__(self):
        self.repos, self.states, self.requests, self.uploads = {}, {}, [], {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments):
                pass

            def do_HEAD(self):
                hub.answer(self)

            def do_GET(self):
                hub.answer(self)

            def do_POST(self):
                hub.answer_upload(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, cache):
        """The environment in which a script sees this hub and an empty cache."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    def send(self, request, status, body=b"", headers=None):
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})}
        request.send_response(status)
        for key, value in {"Content-Length": len(body), **(headers or {})}.items():
            request.send_header(key, str(value))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)

    def find_repo(self, parts):
        """Split URL parts into (kind, id, the rest)."""
        kind = "models"
        if parts[0] in ("models", "datasets"):
            kind, parts = parts[0], parts[1:]
        return (kind, "/".join(parts[:2])), parts[2:]

    def answer(self, request):
        parts = unquote(urlsplit(request.path).path).strip("/").split("/")
        self.requests.append((request.command, request.path))
        is_api = parts[0] == "api"
        repo, rest = self.find_repo(parts[1:] if is_api else parts)
        state = self.states.get(repo)
        if state == "gated" and not (is_api and not rest):
            return self.send(request, 403, {"error": "gated"}, {
                "X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this repository is restricted and you are not in the "
                "authorized list. Visit the page to ask for access."})
        if state == "down":
            return self.send(request, 503, b"down")
        if state == "slow":
            time.sleep(0.5)
        if repo not in self.repos:
            return self.send(request, 401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        folder = self.repos[repo]
        if rest and rest[0] in ("revision", "tree", "resolve", "paths-info") and rest[1] not in ("main", COMMIT):
            return self.send(request, 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        if is_api and (not rest or rest[0] == "revision"):
            return self.send(request, 200, {
                "_id": "0", "id": repo[1], "modelId": repo[1], "sha": COMMIT, "private": False, "disabled": False, "tags": [],
                "gated": "manual" if state == "gated" else False,
                "downloads": 0, "likes": 0, "siblings": [{"rfilename": name} for name in files],
            })
        if is_api and rest[0] == "tree":
            return self.send(request, 200, [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": git_hash(path),
                 **({"lfs": {"oid": sha256(path), "size": path.stat().st_size, "pointerSize": 130}} if is_large(path) else {})}
                for name, path in files.items()
            ])
        if not is_api and rest[0] == "resolve":
            name = "/".join(rest[2:])
            if name not in files:
                return self.send(request, 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            content = files[name].read_bytes()
            headers = {"ETag": f'"{(sha256 if is_large(files[name]) else git_hash)(files[name])}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if state == "damaged":  # as many bytes, but others
                content = content[:-100] + bytes(255 - byte for byte in content[-100:])
            if state == "cut" and request.command == "GET" and len(content) > 1000:
                self.send(request, 200, content[:len(content) // 2], {**headers, "Content-Length": len(content)})
                return request.connection.shutdown(socket.SHUT_RDWR)
            start = 0
            if request.headers.get("Range", "").startswith("bytes="):
                start = int(request.headers["Range"][len("bytes="):].split("-")[0])
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return self.send(request, 206 if start else 200, content[start:], headers)
        return self.send(request, 404, {"error": "not here"}, {"X-Error-Code": "EntryNotFound"})

    def answer_upload(self, request):
        """Take the commit of an upload: `uploads` then maps the repository's id to {path: content}."""
        import base64

        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        parts = unquote(urlsplit(request.path).path).strip("/").split("/")
        self.requests.append((request.command, request.path))
        if parts[:3] == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.uploads[name] = {}
            return self.send(request, 200, {"url": f"{self.url}/{name}", "id": name})
        repo, rest = self.find_repo(parts[1:])
        if rest and rest[0] == "paths-info":
            return self.send(request, 200, [])
        if rest and rest[0] == "preupload":
            files = json.loads(body)["files"]
            return self.send(request, 200, {"files": [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]})
        if rest and rest[0] == "commit":
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.uploads[repo[1]][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            return self.send(request, 200, {"success": True, "commitOid": COMMIT, "commitUrl": f"{self.url}/{repo[1]}/commit/{COMMIT}"})
        return self.send(request, 200, {})
