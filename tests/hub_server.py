"""A hub on the loopback interface: as much of the Hugging Face hub's API as the libraries ask.

HF_ENDPOINT points every library at it. A repository is a folder; one that is in `gated` is refused.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REFUSAL = {
    "X-Error-Code": "GatedRepo",
    "X-Error-Message": "Access is restricted and you are not in the authorized list. Visit "
    "https://huggingface.co/ID to ask for access.",
}


def describe_file(name, path):
    """A file in a listing, named by its content as git does it."""
    content = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return {"type": "file", "path": name, "size": len(content), "oid": blob}


class Hub:
    """A running server. `repos` maps ("models" or "datasets", id) to a folder."""

    def __init__(self):
        self.repos, self.gated, self.requests, self.uploads = {}, set(), [], {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments):
                pass

            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                parts = unquote(urlsplit(self.path).path).strip("/").split("/")
                hub.requests.append((self.command, self.path))
                is_api = parts[0] == "api"
                answer = hub.take if self.command == "POST" else hub.give
                status, content, headers = answer(parts[is_api:], is_api, body)
                if not isinstance(content, bytes):
                    content = json.dumps(content).encode()
                self.send_response(status)
                for header in {"Content-Length": len(content), **headers}.items():
                    self.send_header(*map(str, header))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_HEAD = do_GET = do_POST = answer

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, cache, offline="0"):
        """The environment in which a script sees this hub and an empty cache."""
        options = {"HF_HUB_OFFLINE": offline, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), **options}

    def give(self, parts, is_api, _):
        """(status, content, headers) of what is asked: a repository, its listing, a file."""
        kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
        repo, rest = (kind, "/".join(parts[:2])), parts[2:]
        if repo not in self.repos:
            return 401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        if repo in self.gated and (rest or not is_api):
            return (
                403,
                {"error": "gated"},
                {k: v.replace("ID", repo[1]) for k, v in REFUSAL.items()},
            )
        if rest and rest[1] not in ("main", COMMIT):
            return 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
        folder = self.repos[repo]
        files = {path.name: path for path in sorted(folder.iterdir())}
        if is_api and (not rest or rest[0] == "revision"):
            siblings = [{"rfilename": name} for name in files]
            known = {"id": repo[1], "sha": COMMIT, "private": False, "tags": []}
            return 200, {**known, "gated": False, "siblings": siblings}, {}
        if is_api and rest[0] == "tree":
            return 200, [describe_file(*file) for file in files.items()], {}
        if not is_api and rest[2] in files:
            etag = describe_file(rest[2], files[rest[2]])["oid"]
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
            return 200, files[rest[2]].read_bytes(), headers
        return 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}

    def take(self, parts, _, body):
        """Take an upload: `uploads` then maps the id of the repository to {path: content}."""
        name = "/".join(parts[1:3])
        if parts == ["validate-yaml"]:  # of a model card
            return 200, {"errors": [], "warnings": []}, {}
        if parts[:2] == ["repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.uploads[name] = {"private": asked["visibility"] == "private"}
            return 200, {"url": f"{self.url}/{name}", "id": name}, {}
        if parts[3] == "preupload":
            options = {"uploadMode": "regular", "shouldIgnore": False}
            files = [{"path": file["path"], **options} for file in json.loads(body)["files"]]
            return 200, {"files": files}, {}
        if parts[3] == "commit":
            for entry in map(json.loads, body.decode().splitlines()):
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.uploads[name][entry["value"]["path"]] = content
            url = f"{self.url}/{name}/commit/{COMMIT}"
            return 200, {"success": True, "commitOid": COMMIT, "commitUrl": url}, {}
        return 200, [], {}  # paths-info: nothing is there yet
