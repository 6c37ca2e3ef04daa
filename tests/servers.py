"""Local servers for the tests: one with the OpenAI chat API, and one with the API of the Hub."""

import contextlib
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Reply(NamedTuple):
    """The reply of a server to a request. Content that is not bytes is sent as JSON."""

    status: int
    content: Any
    headers: dict[str, str] = {}


class Server:
    """A server that listens at `url` until the tests end. Subclasses define `reply`."""

    def __init__(self):
        get_reply = self.reply

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def handle_request(self):
                length = int(self.headers.get("Content-Length", 0))
                reply = get_reply(self, self.rfile.read(length))
                if reply is None:
                    self.close_connection = True
                    return
                content = reply.content
                if not isinstance(content, bytes):
                    content = json.dumps(content).encode()
                self.send_response(reply.status)
                for name, value in {"Content-Length": len(content), **reply.headers}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                if self.command != "HEAD":
                    # The client may have given up and closed the connection.
                    with contextlib.suppress(BrokenPipeError):
                        self.wfile.write(content)

            do_HEAD = handle_request
            do_GET = handle_request
            do_POST = handle_request

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()

    def reply(self, request: BaseHTTPRequestHandler, body: bytes) -> Reply | None:
        """Return a reply, or None to close the connection without one."""
        raise NotImplementedError


class ChatServer(Server):
    """A server whose replies come from a function, and which records all requests.

    The function gets the body of a request and the number of earlier requests with the same
    messages. It returns the body of a chat completion, the status of an error, (status, body), or
    None to close the connection.
    """

    def __init__(self, answer: Callable[[dict, int], Any], delay: float = 0.0):
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

    def reply(self, request: BaseHTTPRequestHandler, body: bytes) -> Reply | None:
        if request.command == "GET":  # a check of the connection
            return Reply(405, {})
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
        if answer is None:
            return None
        if isinstance(answer, int):
            return Reply(answer, {"error": {"message": f"status {answer}"}})
        if isinstance(answer, tuple):
            return Reply(*answer)
        return Reply(200, answer)


def completion(
    content: str | None,
    finish_reason: str | None = "stop",
    tool_calls: list[dict] | None = None,
) -> dict:
    """The body of a chat completion."""
    message = {"role": "assistant", "content": content, "tool_calls": tool_calls}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return {"id": "x", "object": "chat.completion", "model": "m", "choices": [choice]}


class Hub(Server):
    """A Hub for HF_ENDPOINT, with the part of the API that the libraries use.

    `repos` maps ("models" or "datasets", id) to a folder. Access to the repositories in `gated` is
    denied.
    """

    def __init__(self):
        self.repos: dict[tuple[str, str], Path] = {}
        self.gated: set[tuple[str, str]] = set()
        self.requests: list[tuple[str, str]] = []
        super().__init__()

    def environment(self, cache: Path, offline: str = "0") -> dict[str, str]:
        """Environment variables with which a script uses this Hub and the cache in a folder."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_HUB_OFFLINE": offline,
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def reply(self, request: BaseHTTPRequestHandler, body: bytes) -> Reply:
        """Describe a repository (/api/...), list its files (/api/.../tree/...) or send a file.

        Addresses are [/api][/models or /datasets]/<owner>/<name>/<action>/<revision>/<file>. Those
        of the files of a model have no kind.
        """
        self.requests.append((request.command, request.path))
        parts = unquote(urlsplit(request.path).path).strip("/").split("/")
        is_api = parts[0] == "api"
        if is_api:
            parts = parts[1:]
        kind = "models"
        if parts[0] in ("models", "datasets"):
            kind = parts[0]
            parts = parts[1:]
        repo_id = "/".join(parts[:2])
        action = parts[2:]
        error = self.find_error((kind, repo_id), action, is_api)
        if error:
            return error
        files = {path.name: path.read_bytes() for path in self.repos[kind, repo_id].iterdir()}
        if is_api and (not action or action[0] == "revision"):
            siblings = [{"rfilename": name} for name in files]
            return Reply(200, {"id": repo_id, "sha": COMMIT, "siblings": siblings})
        if is_api and action[0] == "tree":
            listing = []
            for name, content in files.items():
                listing.append({"type": "file", "path": name, "size": len(content), "oid": name})
            return Reply(200, listing)
        if not is_api and action[2] in files:
            name = action[2]
            return Reply(200, files[name], {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT})
        return Reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

    def find_error(self, repo: tuple[str, str], action: list[str], is_api: bool) -> Reply | None:
        """The error for a repository or a revision that is absent or gated, as the Hub sends it."""
        if repo not in self.repos:
            return Reply(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if repo in self.gated and (action or not is_api):
            _, repo_id = repo
            message = (
                f"Access is restricted. Visit https://huggingface.co/{repo_id} to ask for access"
            )
            return Reply(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": message})
        if action and action[1] not in ("main", COMMIT):
            return Reply(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        return None
