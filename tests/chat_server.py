"""A chat server of OpenAI's protocol on the loopback interface, which can also fail."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ChatServer:
    """A running server, whose replies come from `answer(body, number of times asked for this)`.

    The reply is a dict, the body of a chat completion; a number, the status of a failure; or None:
    the server says nothing and closes the connection. Requests are kept in `requests`.
    """

    def __init__(self, answer, delay=0.0):
        self.answer, self.delay = answer, delay
        self.requests, self.headers, self.num_at_once, self.most_at_once = [], [], 0, 0
        self.lock = threading.Lock()
        chat = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments):
                pass

            def do_POST(self):
                chat.reply(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def send(self, request, status, content):
        body = json.dumps(content).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        with contextlib.suppress(BrokenPipeError):  # of a client that has waited long enough
            request.wfile.write(body)

    def reply(self, request):
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        with self.lock:
            times = sum(body["messages"] == earlier["messages"] for earlier in self.requests)
            self.requests.append(body)
            self.headers.append(request.headers.get("Authorization"))
            self.num_at_once += 1
            self.most_at_once = max(self.most_at_once, self.num_at_once)
        time.sleep(self.delay)
        answer = self.answer(body, times)
        with self.lock:
            self.num_at_once -= 1
        if answer is None:
            request.close_connection = True
        elif isinstance(answer, int):
            self.send(request, answer, {"error": {"message": f"status {answer}"}})
        else:
            self.send(request, 200, answer)


def completion(content, finish_reason="stop", tool_calls=None):
    """The body of a chat completion."""
    message = {"role": "assistant", "content": content, "tool_calls": tool_calls}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason, "logprobs": None}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    body = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "usage": usage}
    return {**body, "choices": [choice]}
