"""The example for Ray Serve, with a real Ray where it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.support import ROOT

PROGRAM = """
import json, socket, httpx
from ray import serve
from examples.ray_replica import app
with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
serve.start(http_options={"host": "127.0.0.1", "port": port})
serve.run(app)
url = f"http://127.0.0.1:{port}/v1/chat/completions"
ask = {"model": "bundled", "messages": [{"role": "user", "content": "What is a list?"}], "max_tokens": 8}
whole = httpx.post(url, json=ask, timeout=60).json()
stream = httpx.post(url, json=ask | {"stream": True}, timeout=60).text
print("ANSWER", json.dumps([whole, stream]), flush=True)
serve.shutdown()
"""


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray: pip install 'ray[serve]'")
def test_a_replica_answers() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=os.environ | {"MEGAKERNEL_GPUS": "0", "MEGAKERNEL_MODEL": "bundled", "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    [answer] = [line.removeprefix("ANSWER ") for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    whole, stream = json.loads(answer)
    pieces = [json.loads(line[6:])["choices"][0]["delta"] for line in stream.splitlines() if line.startswith("data: {")]
    assert whole["choices"][0]["message"]["content"] == "".join(piece.get("content", "") for piece in pieces)
