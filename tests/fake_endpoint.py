"""An OpenAI-compatible server for tests: slow, wrong, rate-limited, broken or cut off, as a script says."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Script = Callable[[int, dict[str, Any]], str]  # (number of the request, its body) -> what to do


def labels_of(prompt: str) -> list[str]:
    """Labels in the prompt, in order."""
    return re.findall(r"\((?:[^()]*, )?([A-Z][\w-]+)\)", prompt) or re.findall(r"labels: ([\w-]+)", prompt)


def good(body: dict[str, Any]) -> str:
    """A text that passes: made from a label of the prompt."""
    prompt = body["messages"][0]["content"]
    kind = "intention" if "wish of a" in prompt else "preference"
    label = labels_of(prompt)[0].lower()
    text = (
        f"something with a bit of {label} tonight" if kind == "intention" else f"Enjoys {label} films of every period."
    )
    return json.dumps({kind: text})


class Endpoint(ThreadingHTTPServer):
    """Answers on localhost; keeps what it was sent."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, script: Script, delay: float = 0.0):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script, self.delay = script, delay
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.headers_seen: list[dict[str, str]] = []
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Endpoint

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            number = len(server.bodies)
            server.bodies.append(body)
            server.times.append(time.monotonic())
            server.headers_seen.append(dict(self.headers))
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        try:
            time.sleep(server.delay)
            self._act(server.script(number, body), body)
        finally:
            with server.lock:
                server.under_way -= 1

    def _act(self, what: str, body: dict[str, Any]) -> None:
        name, _, detail = what.partition(":")
        if name == "good":
            self._completion(good(body))
        elif name == "say":
            self._completion(detail)
        elif name == "long":
            self._completion(detail, finish="length")
        elif name == "no usage":
            self._completion(good(body), usage=False)
        elif name == "status":
            status, _, message = detail.partition(" ")
            self._send(int(status), json.dumps({"error": {"message": message}}).encode())
        elif name == "limited":
            self._send(429, b'{"error": {"message": "slow down"}}', {"Retry-After": detail})
        elif name == "html":
            self._send(200, b"<html>a gateway</html>", {"Content-Type": "text/html"})
        elif name == "not json":
            self._send(200, b'{"id": "x", ')
        elif name == "cut":  # promises more bytes than it sends
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", "4000")
            self.end_headers()
            self.wfile.write(b'{"id": "x", "choices": [')
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
        elif name == "hang":
            time.sleep(float(detail))
            self._completion(good(body))
        else:
            raise AssertionError(what)

    def _completion(self, text: str, finish: str = "stop", usage: bool = True) -> None:
        tree: dict[str, Any] = {
            "id": "x", "object": "chat.completion", "created": 0, "model": "fake",
            "choices": [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}],
        }  # fmt: skip
        if usage:
            tree["usage"] = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
        self._send(200, json.dumps(tree).encode())

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def endpoint(script: Script = lambda number, body: "good", delay: float = 0.0) -> Iterator[Endpoint]:
    """A running server."""
    server = Endpoint(script, delay)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
