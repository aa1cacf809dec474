"""The command line with the real engine on the CPU and the bundled model: what a user types, what a user gets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from tests.support import BUNDLED, ROOT
from tests.support.cli_fakes import EOS, bundled_tokenizer

PROMPT = "Return the"


def command(*argv: str) -> list[str]:
    return [sys.executable, str(ROOT / "run_llama1b.py"), "--backend", "vm", *argv]


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*argv), capture_output=True, text=True, encoding="utf-8", timeout=280, cwd=ROOT)


def run_json(*argv: str) -> dict[str, Any]:
    done = run("--json", *argv)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def greedy() -> dict[str, Any]:
    return run_json("--prompt", PROMPT, "--max-tokens", "12")


def test_greedy_tokens_are_those_of_the_reference(greedy: dict[str, Any]) -> None:
    """Judged in fp32 by transformers: each token's logit is within 2 % of the spread of the best one's.

    The engine rounds matrix inputs to bf16, so a near tie may fall the other way; a wrong decode picks tokens far down.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)
    prompt, tokens = greedy["prompt_token_ids"], greedy["token_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]  # [tokens, vocabulary]
    chosen = logits[torch.arange(len(tokens)), torch.tensor(tokens)]
    assert (chosen >= logits.max(-1).values - 0.02 * (logits.max() - logits.min())).all()


def test_the_object_is_consistent(greedy: dict[str, Any]) -> None:
    tokenizer = bundled_tokenizer()
    assert greedy["model"] == str(BUNDLED)
    assert greedy["backend"] == "vm"
    assert greedy["prompt_token_ids"] == tokenizer.encode(PROMPT).ids
    assert greedy["text"] == tokenizer.decode(greedy["token_ids"], skip_special_tokens=True)
    ended = greedy["token_ids"][-1] == EOS
    assert greedy["finish_reason"] == ("stop" if ended else "length")
    assert ended or len(greedy["token_ids"]) == 12
    assert greedy["ttft_ms"] > 0
    assert greedy["ms_per_token"] > 0


def test_text_mode_prints_the_same_text(greedy: dict[str, Any]) -> None:
    done = run("--prompt", PROMPT, "--max-tokens", "12")
    assert done.returncode == 0
    assert done.stdout == greedy["text"] + "\n"
    assert f"{len(greedy['token_ids'])} tokens" in done.stderr


def test_the_number_of_sms_changes_nothing(greedy: dict[str, Any]) -> None:
    assert run_json("--prompt", PROMPT, "--max-tokens", "12", "--sms", "3")["token_ids"] == greedy["token_ids"]


def test_a_seed_repeats_its_draws_and_another_does_not() -> None:
    argv = ["--prompt", PROMPT, "--max-tokens", "8", "--temperature", "1.5"]
    first, again, other = (run_json(*argv, "--seed", seed)["token_ids"] for seed in ("1", "1", "2"))
    assert first == again
    assert first != other  # a chance of less than one in a million at this temperature


def test_top_k_of_one_is_greedy(greedy: dict[str, Any]) -> None:
    argv = ["--prompt", PROMPT, "--max-tokens", "12", "--temperature", "1", "--top-k", "1"]
    assert run_json(*argv)["token_ids"] == greedy["token_ids"]


def test_a_top_p_that_fp32_does_not_hold_is_greedy(greedy: dict[str, Any]) -> None:
    argv = ["--prompt", PROMPT, "--max-tokens", "12", "--temperature", "1", "--top-p", "1e-300"]
    assert run_json(*argv)["token_ids"] == greedy["token_ids"]


def test_chat_ends_its_turn() -> None:
    found = run_json("--chat", "--prompt", "What does str.upper do?", "--max-tokens", "60")
    assert found["prompt_token_ids"][:2] == [0, 3]
    assert found["text"].strip()
    assert EOS not in found["token_ids"][:-1]


def test_more_tokens_than_fit_are_refused() -> None:
    done = run("--prompt", PROMPT, "--max-tokens", "1000000000")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_gpu_that_is_not_there_is_one_clear_line() -> None:
    argv = [sys.executable, str(ROOT / "run_llama1b.py"), "--backend", "gpu"]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, cwd=ROOT, env=hidden)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert "GPU" in done.stderr
    assert done.stderr.count("\n") == 1


def test_without_a_gpu_plain_pytorch_says_the_same(greedy: dict[str, Any]) -> None:
    argv = [sys.executable, str(ROOT / "run_llama1b.py"), "--json", "--prompt", PROMPT, "--max-tokens", "12"]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, cwd=ROOT, env=hidden)
    found = json.loads(done.stdout)
    assert (done.returncode, found["backend"]) == (0, "torch")
    assert found["token_ids"] == greedy["token_ids"]


def test_ctrl_c_keeps_what_was_printed() -> None:
    argv = command("--prompt", PROMPT, "--max-tokens", "1000", "--temperature", "3")  # too hot to end by itself
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        begun = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (begun + out).endswith(b"\n")
    assert b"(interrupted)" in err
    assert b"Traceback" not in err
