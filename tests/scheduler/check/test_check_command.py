"""`python -m scheduler.check` and `python -m scheduler`, the proof at every door, and the checker's independence."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from instructions.codec import Word
from instructions.sample import Sample
from models.config import ModelConfig
from scheduler.__main__ import main as schedule_main
from scheduler.build import build_program, load_program, make_shape
from scheduler.check.__main__ import SHOWN
from scheduler.check.__main__ import main as check_main
from scheduler.errors import ScheduleError
from scheduler.program import Program
from tests.mutations.draft import Draft
from tests.support import ROOT

CONFIG = ModelConfig(
    hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=100
)  # fmt: skip


def make_program() -> Program:
    return build_program(make_shape(CONFIG, sms=3, capacity=256, bucket=256), 3)


def faulty_program() -> Program:
    """`Sample` waits for nothing."""
    draft = Draft.of(make_program())
    draft.change(draft.sites(lambda item: isinstance(item.instruction, Sample))[0], waits=())
    program = draft.program()
    assert program is not None
    return program


def test_a_proven_program_exits_0_with_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.npz"
    make_program().save(path)
    assert check_main([str(path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{path}: proven free of deadlocks and races: ") and "on 3 SMs" in out


def test_a_faulty_program_exits_1_with_the_findings(tmp_path: Path) -> None:
    """As a user runs it, in a process of its own."""
    path = tmp_path / "p.npz"
    faulty_program().save(path)
    done = subprocess.run(
        [sys.executable, "-m", "scheduler.check", str(path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (1, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("race: sm ") and "[sample layer=0 slots=3" in lines[0]
    assert "reads logits[0][0:100], but no path leads to it" in lines[0]
    assert lines[-1].startswith(f"{path}: refused, ")


def test_many_findings_are_cut_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = make_program()
    program.words[:, Word.PAYLOAD + 5] = 1
    program.save(tmp_path / "p.npz")
    assert check_main([str(tmp_path / "p.npz")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == SHOWN + 2 and lines[-2] == f"... and {len(program.words) - SHOWN} more"


@pytest.mark.parametrize("content", [None, b"no program"])
def test_no_program_exits_2_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None) -> None:
    path = tmp_path / "p.npz"
    if content is not None:
        path.write_bytes(content)
    assert check_main([str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(f"error: {path}: ") and captured.err.count("\n") == 1


def test_loading_checks_again(tmp_path: Path) -> None:
    make_program().save(tmp_path / "good.npz")
    assert np.array_equal(load_program(tmp_path / "good.npz").words, make_program().words)
    faulty_program().save(tmp_path / "bad.npz")
    with pytest.raises(ScheduleError, match="not safe to run: race"):
        load_program(tmp_path / "bad.npz")


def test_building_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the scheduler wrong, its program would not come out."""
    faulty = faulty_program()
    monkeypatch.setattr("scheduler.build.schedule", lambda *_: faulty)
    with pytest.raises(ScheduleError, match="not safe to run: race"):
        make_program()


def test_the_scheduler_command_makes_a_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.npz"
    options = ["--model", "random:llama-3.2-1b", "--sms", "16", "--bucket", "128", "--policy", "balanced", "-o", str(path)]
    assert schedule_main(options) == 0
    assert capsys.readouterr().out.startswith(f"{path}: ")
    program = load_program(path)
    assert (program.sms, program.policy, program.shape.bucket, program.shape.capacity) == (16, "balanced", 128, 4096)
    assert schedule_main([*options[:6], "--disassemble"]) == 0
    listing = capsys.readouterr().out.splitlines()
    assert len(listing) > 100 and listing[0].startswith("sm 0   #0   ")


def test_the_scheduler_command_makes_a_tail(tmp_path: Path) -> None:
    path = tmp_path / "p.npz"
    assert schedule_main(["--model", "llama-3.2-1b", "--sms", "16", "--bucket", "128", "--tail", "-o", str(path)]) == 0
    program = load_program(path)
    instructions = [item.instruction for queue in program.decoded for item in queue]
    assert program.shape.tail and {item.layer for item in instructions if item.LAYERED} == {15}


def test_the_scheduler_command_reads_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(
        '{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, '
        '"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, '
        '"max_position_embeddings": 300, "rms_norm_eps": 1e-5, "hidden_act": "silu"}'
    )
    assert schedule_main(["--model", str(tmp_path), "--sms", "2", "--dtype", "fp32", "--slices", "2", "--ring", "4"]) == 0
    assert "on 2 SMs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "nowhere"], "neither a directory nor a preset"),
        (["--model", "random:nothing"], "neither a directory nor a preset"),
        (["--model", ""], "--model is empty"),
        (["--model", "llama-3.2-1b", "--sms", "201"], "201 SMs asked for"),
        (["--model", "llama-3.2-1b", "--sms", "4", "--capacity", "99999999999"], "choose 1 to 131072"),
        (["--model", "llama-3.2-1b", "--sms", "4", "--slices", "999999999"], "use 1 to 200"),
        (["--model", "llama-3.2-1b", "--sms", "4", "--bucket", "64", "-o", ""], "is empty: name a place"),
        (["--model", "llama-3.2-1b", "--sms", "4", "--bucket", "64", "-o", "/dev/null"], "is a device, not a file"),
        (["--model", "llama-3.2-1b", "--sms", "4", "--bucket", "64", "-o", "/"], "is a folder, not a file"),
        (["--model", "llama-3.2-1b", "--sms", "4", "--bucket", "0"], "a context bucket of 0"),
        (["--model", "llama-3.2-1b", "--sms", "4", "--bucket", "64", "--ring", "30"], "bytes of shared memory"),
        (["--model", "llama-3.2-1b", "--sms", "4", "--bucket", "64", "--ring", "0"], "a ring of 0 pages"),
    ],
)
def test_the_scheduler_command_refuses_in_one_line(capsys: pytest.CaptureFixture[str], options: list[str], words: str) -> None:
    assert schedule_main(options) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert words in captured.err


def test_a_program_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "nowhere" / "p.npz"
    assert schedule_main(["--model", "llama-3.2-1b", "--sms", "2", "--bucket", "64", "-o", str(path)]) == 2
    assert capsys.readouterr().err == f"error: {path}: cannot be written (No such file or directory)\n"


def test_the_checker_shares_no_code_with_the_scheduler() -> None:
    """It may import what describes the machine and the model; of the scheduler only limits and errors, the program's type
    for annotations, and the file format for its command."""
    allowed = ("instructions.", "models.", "scheduler.check", "scheduler.limits", "scheduler.errors")
    for path in sorted((ROOT / "scheduler" / "check").glob("*.py")):
        tree = ast.parse(path.read_text())
        typing_only = {
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node not in typing_only and node.module is not None:
                if node.module.split(".")[0] in ("scheduler", "megakernel", "instructions", "models", "bench"):
                    command = path.name == "__main__.py" and node.module == "scheduler.program"
                    assert node.module.startswith(allowed) or command, f"{path.name} imports {node.module}"
            elif isinstance(node, ast.Import) and node not in typing_only:
                assert all(alias.name in ("numpy", "argparse", "sys") for alias in node.names), path.name
