"""A server in the place of vLLM's or SGLang's: streams words in their form, dies at once, or never says that it is well.

python -m tests.support.fake_peer KIND MODEL PORT
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Handler(BaseHTTPRequestHandler):
    """`kind`: "good", "silent" or "refusing"."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    kind = "good"

    def do_GET(self) -> None:
        self.send_response(503 if self.kind == "silent" else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        good = self.kind == "good" and asked["ignore_eos"] and asked["model"] == "measured"
        if not good:
            self.send_response(400)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number in range(asked["max_tokens"]):
            last = number + 1 == asked["max_tokens"]
            choice = {"index": 0, "text": f"<{number}>", "logprobs": None, "finish_reason": "length" if last else None}
            self.event({"id": "a", "choices": [choice], "usage": None})
            time.sleep(0.001)
        self.event({"id": "a", "choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": asked["max_tokens"]}})
        self.event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def event(self, content: Any) -> None:
        data = f"data: {content if isinstance(content, str) else json.dumps(content)}\n\n".encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def log_message(self, *_: Any) -> None:
        """Nothing."""


def main(kind: str, model: str, port: str) -> None:
    if kind == "dying":
        print("loading\nerror: unrecognized arguments: --flag", file=sys.stderr)
        raise SystemExit(3)
    if not ((Path(model) / "config.json").is_file() and (Path(model) / "tokenizer.json").is_file()):
        raise SystemExit("there is no model")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # as theirs have
    print(f"child {child.pid}", flush=True)
    Handler.kind = kind
    ThreadingHTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
