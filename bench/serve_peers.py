"""Other servers of OpenAI's API beside ours: vLLM's and SGLang's, each in a process of its own, where they are installed.

The model is a directory that both sides read, or `random:<preset>`: then a peer is given the configuration, a made-up tokenizer
with a word for every id, and makes up weights of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from bench.compare.engines import EngineSpec, split_python, worker_environment
from models.checkpoint import open_checkpoint
from models.errors import MachineError, UserError
from models.output import write_file
from models.synthetic import write_config

START_SECONDS = 600.0  # for a server to answer: it compiles, and captures graphs
STOP_SECONDS = 30.0
LOOK_SECONDS = 0.5  # between two looks whether it answers
RANDOM = "random:"
WHOLE = {"ignore_eos": True}  # what a request says beside the usual, so that an answer has all tokens


@dataclass(frozen=True)
class Peer:
    """One server.  command: the module and its options, with {model}, {name}, {context}, {sequences}, {port} to be filled in;
    made_up: what follows where it makes up weights.  python, site: as of `bench.compare`'s engines."""

    name: str
    label: str
    module: str
    command: tuple[str, ...]
    made_up: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    python: str = sys.executable
    site: str = ""


ADDRESS = ("--host", "127.0.0.1", "--port", "{port}")
DUMMY = ("--load-format", "dummy")
_VLLM = (
    "vllm.entrypoints.openai.api_server --model {model} --served-model-name {name} --dtype bfloat16 --max-model-len {context} "
)
_VLLM += "--max-num-seqs {sequences} --no-enable-prefix-caching --gpu-memory-utilization 0.5 --disable-uvicorn-access-log"
_SGLANG = "sglang.launch_server --model-path {model} --served-model-name {name} --dtype bfloat16 --context-length {context} "
_SGLANG += "--max-running-requests {sequences} --disable-radix-cache --mem-fraction-static 0.5 --log-level-http warning"
VLLM_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # which may not be installed; greedy requests do without
}
PEERS = (
    Peer("vllm", "vLLM", "vllm", (*_VLLM.split(), *ADDRESS), DUMMY, VLLM_ENVIRONMENT),
    Peer("sglang", "SGLang", "sglang", (*_SGLANG.split(), *ADDRESS), DUMMY),
)


def choose_peers(named: Sequence[str] | None, peers: Sequence[Peer] = PEERS) -> list[Peer]:
    """The peers to measure: those named as "NAME=PYTHON[:PATH]", or "none"; None: those that this interpreter can import.

    Raises UserError for what is unknown.
    """
    if named is None:
        return [peer for peer in peers if importlib.util.find_spec(peer.module) is not None]
    known, chosen = {peer.name: peer for peer in peers}, []
    for entry in named:
        if entry == "none":
            continue
        name, (python, site) = split_python(entry, "--peer")
        if name not in known:
            raise UserError(f"--peer {entry}: there is no peer {name!r}, choose among {', '.join(known)}, or none")
        chosen.append(replace(known[name], python=python, site=site))
    return chosen


def can_serve(model: str) -> bool:
    """Whether peers can be given the model: of made-up weights, or a directory with a configuration."""
    return model.startswith(RANDOM) or (Path(model) / "config.json").is_file()


def peer_model(model: str, folder: Path) -> Path:
    """What a peer reads: the model's own directory or, of made-up weights, `folder` with a configuration and a tokenizer."""
    if not model.startswith(RANDOM):
        return Path(model).absolute()
    config = open_checkpoint(model).config
    write_config(config, folder)
    words = {f"<{token}>": token for token in range(config.vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<0>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    write_file(folder / "tokenizer.json", tokenizer.to_str())
    write_file(folder / "tokenizer_config.json", json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<0>"}))
    return folder


def server_options(peer: Peer, model: str, context: int, sequences: int, port: int, name: str, made_up: bool) -> list[str]:
    """What follows the interpreter and -m."""
    values = {"model": model, "name": name, "context": context, "sequences": sequences, "port": port}
    return [part.format(**values) for part in (*peer.command, *(peer.made_up if made_up else ()))]


@contextmanager
def peer_server(peer: Peer, options: Sequence[str], port: int, log: Path, seconds: float = START_SECONDS) -> Iterator[str]:
    """A peer's server in a process group of its own, ended with all its processes; its address, once it answers.

    Raises MachineError with the last line of its log where it ends before, or does not answer in time.
    """
    spec = EngineSpec(peer.name, "", peer.label, environment=peer.environment, python=peer.python, site=peer.site)
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as written:
        try:
            process = subprocess.Popen(
                [peer.python, "-m", *options],
                env=worker_environment(spec),
                stdin=subprocess.DEVNULL,
                stdout=written,
                stderr=written,
                start_new_session=True,
            )
        except OSError as error:
            raise MachineError(f"{peer.label}'s server cannot be started: {error}") from error
        try:
            wait_until_ready(peer, process, url, log, seconds)
            yield url
        finally:
            end_group(process)


def wait_until_ready(peer: Peer, process: subprocess.Popen[bytes], url: str, log: Path, seconds: float) -> None:
    """Ask for its health until that is good."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if process.poll() is not None:
            raise MachineError(f"{peer.label}'s server ended with {process.returncode}: {last_line(log)}")
        with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(LOOK_SECONDS)
    raise MachineError(f"{peer.label}'s server has not answered within {seconds:.0f} s: {last_line(log)}")


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ask the whole group to end, then make it."""
    for number, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=seconds)


def last_line(log: Path) -> str:
    """What a server said last."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it has said nothing"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def peer_version(peer: Peer) -> str | None:
    """The version of its package in its own interpreter."""
    asked = f"import importlib.metadata as m; print(m.version({peer.module!r}))"
    spec = EngineSpec(peer.name, "", peer.label, python=peer.python, site=peer.site)
    with suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(
            [peer.python, "-c", asked], env=worker_environment(spec), capture_output=True, text=True, timeout=60
        )
        return found.stdout.strip() or None
    return None
