"""Other servers beside ours in `bench.serve`: how they are chosen, started, asked and ended; with a fake one in their place."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from bench import serve
from bench.serve import WARM, beside, line, parser, prompts
from bench.serve_chart import draw
from bench.serve_client import Reading
from bench.serve_peers import DUMMY, PEERS, Peer, can_serve, choose_peers, free_port, peer_model, peer_server, server_options
from models.errors import MachineError, UserError
from tests.support import BUNDLED

MODEL = "random:smollm2-135m"


def fake(kind: str) -> Peer:
    return Peer("vllm", "Fake", "tokenizers", ("tests.support.fake_peer", kind, "{model}", "{port}"), ())


def options() -> argparse.Namespace:
    return parser().parse_args(["--model", MODEL, "--prompt", "8", "--tokens", "6", "--requests", "6"])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "STREAMS", (1, 2))
    monkeypatch.setattr(serve, "ROUNDS", 1)
    monkeypatch.setattr("bench.serve_peers.LOOK_SECONDS", 0.05)


def gone(pid: int) -> bool:
    """Within a few seconds; a process that is dead but not yet taken note of counts."""
    for _ in range(50):
        try:
            os.kill(pid, 0)
            if re.search(r"^State:\s+Z", Path(f"/proc/{pid}/status").read_text(), flags=re.MULTILINE):
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.1)
    return False


def test_a_peer_is_measured_as_we_are(quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = prompts(8, WARM + 2, 1000)
    found = beside(fake("good"), options(), 1000, asked, [50.0, 60.0, 70.0, 80.0])
    assert "error" not in found and found["version"]
    assert len(found["one_stream"]["first_ms"]["runs"]) == 2 and found["one_stream"]["ms_per_token"]["median"] > 0.9
    assert set(found["streams"]) == {1, 2} and all(rate > 0 for rate in found["streams"].values())
    assert [load["requests_a_second"] for load in found["loads"]] == [50, 60, 70, 80]
    assert all(load["answered"] == load["requests"] == 6 for load in found["loads"])
    assert str(tmp_path.parent) not in json.dumps(found) and MODEL in found["command"], "no place of this machine"
    printed = capsys.readouterr().out
    assert printed.startswith("Fake:\n") and line(found["loads"][0]) in printed
    record = {"loads": found["loads"], "peers": {"vllm": found, "sglang": {"error": "none"}}}
    both = draw(record, tmp_path / "both.svg").read_text()
    assert "vLLM, p50" in both and "SGLang" not in both
    assert "vLLM" not in draw({"loads": found["loads"]}, tmp_path / "alone.svg").read_text()


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("dying", "Fake's server ended with 3: error: unrecognized arguments: --flag"),
        ("silent", "Fake's server has not answered within 3 s: child"),
        ("refusing", "the server answered 2 of 2 requests with status 400"),
    ],
)
def test_one_that_fails_is_a_line_of_the_record(
    quick: None, kind: str, why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sooner(peer: Peer, started: list[str], port: int, log: Path) -> AbstractContextManager[str]:
        return peer_server(peer, started, port, log, seconds=3 if kind == "silent" else 60)

    monkeypatch.setattr(serve, "peer_server", sooner)
    found = beside(fake(kind), options(), 1000, prompts(8, WARM + 2, 1000), [50.0] * 4)
    assert found["error"].startswith(why) and "loads" not in found
    assert why in capsys.readouterr().out


def test_all_its_processes_end(quick: None, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    port, log = free_port(), tmp_path / "log"
    started = server_options(fake("good"), str(peer_model(MODEL, folder)), 256, 8, port, "measured", made_up=True)
    with pytest.raises(KeyboardInterrupt), peer_server(fake("good"), started, port, log):
        raise KeyboardInterrupt
    assert gone(int(re.findall(r"child (\d+)", log.read_text())[0]))


def test_an_interpreter_that_is_not_there(tmp_path: Path) -> None:
    with (
        pytest.raises(MachineError, match="cannot be started"),
        peer_server(replace(fake("good"), python="/nowhere/python"), ["a"], 1, tmp_path / "log"),
    ):
        pass


def test_a_made_up_model_has_a_word_for_every_id(tmp_path: Path) -> None:
    folder = peer_model(MODEL, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == config["vocab_size"] == 49152
    assert tokenizer.decode([17, 49151]) == "<17> <49151>" and tokenizer.encode("<3> <5>").ids == [3, 5]
    assert peer_model(str(tmp_path), tmp_path / "unused") == tmp_path and not (tmp_path / "unused").exists()


def test_who_is_chosen() -> None:
    assert choose_peers(None) == [], "none is installed here"
    assert choose_peers(None, [fake("good"), *PEERS]) == [fake("good")]
    assert choose_peers(["none"]) == []
    (found,) = choose_peers([f"sglang={sys.executable}:/tmp"])
    assert (found.name, found.python, found.site) == ("sglang", sys.executable, "/tmp")
    assert can_serve(MODEL) and not can_serve("owner/name") and not can_serve(str(BUNDLED / "model.safetensors"))


@pytest.mark.parametrize("entry", ["vllm", "vllm=", "ollama=python3", "vllm=python3:/nowhere/at/all"])
def test_a_peer_that_is_none_is_refused_in_a_line(entry: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="--peer"):
        choose_peers([entry])
    assert serve.main(["--model", MODEL, "--peer", entry]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("peer", PEERS, ids=[peer.name for peer in PEERS])
def test_every_gap_of_a_command_is_filled(peer: Peer) -> None:
    found = server_options(peer, "folder", 512, 8, 8123, "measured", made_up=True)
    assert not any("{" in part for part in found) and found[-2:] == list(DUMMY)
    assert {"folder", "measured", "512", "8", "8123"} <= set(found)
    assert list(DUMMY)[0] not in server_options(peer, "folder", 512, 8, 8123, "measured", made_up=False)


def test_events_with_spaces_and_a_last_piece_that_says_why() -> None:
    reading = Reading(0.0)
    head = b"HTTP/1.1 200 OK\r\n\r\n"
    assert not reading.take(head + b'data: {"choices": [{"text": "a", "finish_reason": null}]}\n\n', 1.0)
    assert not reading.take(b'data: {"choices": [{"finish_reason": "length", "text": "b"}]}\n\n', 2.0)
    assert reading.take(b'data: {"choices": [], "usage": {"completion_tokens": 2}}\n\ndata: [DONE]\n\n', 3.0)
    assert reading.answer.pieces == [1.0, 2.0] and reading.answer.tokens == 2
