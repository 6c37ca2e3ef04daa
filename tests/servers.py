"""Servers on the loopback interface: one of OpenAI's chat protocol, and a Hugging Face hub."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Server:
    """A server that runs at `url` until the tests end. `reply(request, body)` returns (status,
    content, headers), or None: the server says nothing and closes the connection."""

    def __init__(self):
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments):
                pass

            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                reply = owner.reply(self, body)
                if reply is None:
                    self.close_connection = True
                    return
                status, content, headers = reply
                if not isinstance(content, bytes):
                    content = json.dumps(content).encode()
                self.send_response(status)
                for header in {"Content-Length": len(content), **headers}.items():
                    self.send_header(*map(str, header))
                self.end_headers()
                if self.command != "HEAD":
                    with contextlib.suppress(BrokenPipeError):  # of a client that waited enough
                        self.wfile.write(content)

            do_HEAD = do_GET = do_POST = answer

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()


class ChatServer(Server):
    """Its replies come from `answer(asked, number of times asked for this)`: the body of a chat
    completion, (status, body), the status of a failure, or None. What it was asked is kept in
    `requests`, with the `paths`, `keys` and `headers` of all requests."""

    def __init__(self, answer, delay=0.0):
        self.answer = answer
        self.delay = delay
        self.requests = []
        self.paths = set()
        self.keys = set()
        self.headers = []
        self.lock = threading.Lock()
        self.num_at_once = 0
        self.most_at_once = 0
        super().__init__()

    def reply(self, request, body):
        asked = json.loads(body)
        with self.lock:
            times = sum(asked["messages"] == earlier["messages"] for earlier in self.requests)
            self.requests.append(asked)
            self.paths.add(request.path)
            self.keys.add(request.headers.get("Authorization"))
            self.headers.append(str(request.headers))
            self.num_at_once += 1
            self.most_at_once = max(self.most_at_once, self.num_at_once)
        time.sleep(self.delay)
        with self.lock:
            self.num_at_once -= 1
        answer = self.answer(asked, times)
        if isinstance(answer, int):
            return answer, {"error": {"message": f"status {answer}"}}, {}
        if isinstance(answer, tuple):
            return *answer, {}
        return None if answer is None else (200, answer, {})


def completion(content, finish_reason="stop", tool_calls=None):
    """The body of a chat completion."""
    message = {"role": "assistant", "content": content, "tool_calls": tool_calls}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return {"id": "x", "object": "chat.completion", "model": "m", "choices": [choice]}


class Hub(Server):
    """As much of the hub as the libraries ask, for HF_ENDPOINT. `repos` maps ("models" or
    "datasets", id) to a folder; one that is in `gated` is refused."""

    def __init__(self):
        self.repos, self.gated, self.requests = {}, set(), []
        super().__init__()

    def environment(self, cache, offline="0"):
        """The environment in which a script sees this hub and an empty cache."""
        options = {"HF_HUB_OFFLINE": offline, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), **options}

    def reply(self, request, _):
        """What is asked for: a repository, its listing, a file."""
        self.requests.append((request.command, request.path))
        parts = unquote(urlsplit(request.path).path).strip("/").split("/")
        is_api = parts[0] == "api"
        parts = parts[is_api:]
        kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
        repo, rest = (kind, "/".join(parts[:2])), parts[2:]
        if repo not in self.repos:
            return 401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        if repo in self.gated and (rest or not is_api):
            said = f"Access is restricted. Visit https://huggingface.co/{repo[1]} to ask for access"
            return 403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": said}
        if rest and rest[1] not in ("main", COMMIT):
            return 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
        files = {path.name: path.read_bytes() for path in self.repos[repo].iterdir()}
        if is_api and (not rest or rest[0] == "revision"):
            siblings = [{"rfilename": name} for name in files]
            return 200, {"id": repo[1], "sha": COMMIT, "siblings": siblings}, {}
        if is_api and rest[0] == "tree":
            sizes = {name: len(content) for name, content in files.items()}
            listing = [{"type": "file", "path": n, "size": sizes[n], "oid": n} for n in files]
            return 200, listing, {}
        if not is_api and rest[2] in files:
            return 200, files[rest[2]], {"ETag": f'"{rest[2]}"', "X-Repo-Commit": COMMIT}
        return 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
