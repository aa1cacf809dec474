"""The examples of docs/server.md, run as they stand against a real server."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest

from serving.command import parse
from serving.schema import ChatRequest, CompletionRequest
from tests.support import ROOT
from tests.support.served import Served

PAGE = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"
COMMANDS = [
    command
    for block in re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
    for command in re.split(r"\n(?=curl )", block.strip())
]


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("command", COMMANDS, ids=range(len(COMMANDS)))
def test_what_the_page_says_to_curl_is_answered(model_server: Served, command: str) -> None:
    line = command.replace(ADDRESS, model_server.url).replace("curl -s", "curl --fail-with-body -s", 1)
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    if "/metrics" in command:
        assert "megakernel_requests_total" in done.stdout
    elif '"stream": true' in command:
        events = [event.removeprefix("data: ") for event in done.stdout.strip().split("\n\n")]
        assert events[-1] == "[DONE]" and json.loads(events[-2])["usage"]["completion_tokens"] == 20
    else:
        assert json.loads(done.stdout)


def test_the_page_has_examples_of_every_path() -> None:
    paths = {path for command in COMMANDS for path in re.findall(rf"{ADDRESS}(/\S+)", command)}
    assert paths == {
        "/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics", "/tokenize", "/detokenize"
    }  # fmt: skip


def test_what_the_page_says_of_the_client_runs(model_server: Served) -> None:
    [code] = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    program = code.replace(ADDRESS, model_server.url)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and len(done.stdout) > 10, done.stderr


def test_the_table_names_every_field() -> None:
    table = PAGE.split("## What it takes")[1].split("Whatever else")[0]
    named = set(re.findall(r"`(\w+)(?:\.\w+)?`(?=[,` ]*[^|\n]*\|)", "".join(line for line in table.splitlines(keepends=True))))
    assert {*ChatRequest.model_fields, *CompletionRequest.model_fields} <= named


def test_the_options_that_the_page_names_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = capsys.readouterr().out
    for option in set(re.findall(r"`(--[a-z-]+)`", PAGE)):
        assert option in shown
