"""Adding an instruction is what CONTRIBUTING.md says, and no more: tried on a copy of the packages, with a toy.

The toy passes attention's output on, so tokens and logits must keep their bits.  Everything that the copy gets stands
here: the toy's file, two lines of the registry, two of the lowering, and a reader of the buffer that it brings.  It has no
twin: the copy runs on the CPU machine.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("instructions", "scheduler", "tests", "docs")
LINKED = ("models", "megakernel", "bench", "scripts")

RELAY = '''"""Relay: relayed[layer] = attn[layer], for the query group of one KV head."""

from __future__ import annotations

from dataclasses import dataclass

from instructions.base import Activation, Cost, Instruction, Machine, Pages, Region
from instructions.dimensions import Dimensions


@dataclass(frozen=True)
class Relay(Instruction):
    """Query group number `team`."""

    OPCODE = 30
    MNEMONIC = "relay"
    LAYERED, SHORT = True, True
    BRINGS = (Activation("relayed", lambda shape: shape.query_rows),)

    team: int

    def field_ranges(self, shape: Dimensions, sms: int) -> dict[str, tuple[int, int]]:
        return {"team": (0, shape.config.num_kv_heads - 1)}

    def rows(self, shape: Dimensions) -> tuple[int, int]:
        return self.team * shape.group_rows, (self.team + 1) * shape.group_rows

    def reads(self, shape: Dimensions) -> tuple[Region, ...]:
        return (Region("attn", self.layer, *self.rows(shape)),)

    def writes(self, shape: Dimensions) -> tuple[Region, ...]:
        return (Region("relayed", self.layer, *self.rows(shape)),)

    def cost(self, shape: Dimensions, past: int) -> Cost:
        return Cost(0, 0)

    def execute(self, machine: Machine) -> Pages:
        machine.write(self.writes(machine.shape)[0], machine.read(self.reads(machine.shape)[0]))
        yield from ()
'''
EDITS = {
    "instructions/registry.py": [
        ("from instructions.sample import Sample\n", "from instructions.relay import Relay\n"),
        ("    Attention,\n", "    Relay,\n"),
    ],
    "scheduler/lower.py": [
        ("from instructions.qkv import Qkv\n", "from instructions.relay import Relay\n"),
        (
            "        yield from (Combine(layer, head, column) for column in range(shape.columns) for head in heads)\n",
            "    yield from (Relay(layer, head) for head in heads)\n",
        ),
    ],
}
READER = ("instructions/o_proj.py", '"o", "attn"', '"o", "relayed"')

DECODE = """
import hashlib, json, sys
from instructions.codec import disassemble
from megakernel.vm import Vm
from models.config import ModelConfig
from models.packed import pack
from models.random_weights import RandomWeights
from scheduler.build import build_program, make_shape
import torch
sizes = {"hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "vocab_size": 100}
config = ModelConfig(**sizes, num_heads=4, num_kv_heads=2, head_dim=16)
program = build_program(make_shape(config, sms=3, capacity=128, bucket=128, slices=2), 3)
vm = Vm(program, pack(RandomWeights(config), config, torch.bfloat16, 128))
vm.state.start((3, 1, 4))
vm.launch(6)  # three tokens of the prompt, of which the last brings the first new one
lines = [disassemble(item).split()[:3] for queue in program.decoded for item in queue]
bits = hashlib.sha256(vm.logits().numpy().tobytes()).hexdigest()
answer = {"tokens": vm.state.generated, "bits": bits, "buffers": list(program.shape.buffers), "lines": lines}
"""
CHECK = """
from dataclasses import replace
from instructions.codec import Word
from instructions.registry import BY_OPCODE
from instructions.shape import ANNOUNCED
from scheduler.check import check
from scheduler.draw.layout import group_key
from scheduler.draw.palette import COLOURS
Relay = BY_OPCODE[30]
words = program.words.copy()
words[words[:, Word.OPCODE] == 30, Word.PAYLOAD] += 2
said = lambda program: sorted({f"{finding.kind}: {finding.message}" for finding in check(program).findings})
answer |= {"announced": "relayed" in ANNOUNCED, "coloured": "relay" in COLOURS, "group": group_key(Relay(1, 0))}
answer["out of range"] = said(replace(program, words=words))
ranges = Relay.field_ranges
del Relay.field_ranges
answer["no range"] = said(program)
Relay.field_ranges, Relay.LAYERED = ranges, None
answer["no layer"] = said(program)
"""


def run(tree: Path, *arguments: str) -> str:
    """What a Python prints that imports from `tree` alone."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=240)
    assert not done.stderr, done.stderr[-4000:]
    return done.stdout


def answer(tree: Path, script: str) -> dict[str, Any]:
    """The dictionary that a script leaves in `answer`."""
    found: dict[str, Any] = json.loads(run(tree, "-c", f"{script}\nprint(json.dumps(answer))"))
    return found


def insert(tree: Path, name: str, after: str, line: str) -> None:
    text = (tree / name).read_text(encoding="utf-8")
    assert text.count(after) == 1, f"{name} has no line {after!r} to put the toy behind"
    (tree / name).write_text(text.replace(after, after + line), encoding="utf-8")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages with the toy."""
    tree = tmp_path_factory.mktemp("tree")
    for name in COPIED:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in LINKED:
        (tree / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "pyproject.toml", tree)
    (tree / "instructions" / "relay.py").write_text(RELAY, encoding="utf-8")
    for name, edits in EDITS.items():
        for after, line in edits:
            insert(tree, name, after, line)
    path, old, new = READER
    reader = (tree / path).read_text(encoding="utf-8")
    assert reader.count(old) == 1
    (tree / path).write_text(reader.replace(old, new), encoding="utf-8")
    return tree


def test_scheduler_checker_codec_machine_and_drawings_know_it(tree: Path) -> None:
    ours, theirs = answer(ROOT, DECODE), answer(tree, DECODE + CHECK)
    assert len(ours["tokens"]) == 4 and (ours["tokens"], ours["bits"]) == (theirs["tokens"], theirs["bits"])
    assert set(theirs["buffers"]) - set(ours["buffers"]) == {"relayed"} and theirs["announced"]
    relays = [line for line in theirs["lines"] if line[0] == "relay"]
    assert sorted(relays) == [["relay", f"layer={layer}", f"team={team}"] for layer in (0, 1) for team in (0, 1)]
    assert theirs["coloured"] and theirs["group"] == [1, 1]
    assert theirs["out of range"] == ["field: team=2, it must be 0 to 1", "field: team=3, it must be 0 to 1"]
    assert theirs["no range"] == ["field: relay states no range for team"]
    assert theirs["no layer"] == ["field: relay does not say whether it belongs to a layer"]


def failures(tree: Path) -> set[str]:
    """Tests of the codec, of declarations and of the documents that fail in the copy, by name."""
    tests = [f"tests/instructions/test_{name}.py" for name in ("codec", "declarations", "instruction_docs")]
    chosen = "relay or buffer or nothing or whole or tape"
    program = f"import sys, pytest; pytest.main({['-q', '-p', 'no:cacheprovider', '--tb=no', '-k', chosen, *tests]!r})"
    printed = run(tree, "-c", program)
    assert int(re.findall(r"(\d+) passed", printed)[0]) >= 10, printed
    return set(re.findall(r"^FAILED \S*::(\S+)", printed, re.MULTILINE))


def test_the_tests_ask_for_its_rows_in_the_documents(tree: Path) -> None:
    """And for nothing else: codec and declarations are tested from the class alone."""
    asked = {"test_every_instruction_has_its_row[relay]", "test_no_row_is_for_nothing", "test_every_buffer_has_its_row"}
    assert failures(tree) == asked
    documents = "docs/instructions.md"
    text = (tree / documents).read_text(encoding="utf-8")
    [row] = re.findall(r"^\| 4 \| `combine`.*\n", text, re.MULTILINE)
    [buffer] = re.findall(r"^\| `attn` \|.*\n", text, re.MULTILINE)
    insert(tree, documents, row, "| 30 | `relay` | `team` | attn[l], one group | relayed[l] | `relayed = attn` |\n")
    insert(tree, documents, buffer, "| `relayed` | layers | heads · dp |\n")
    assert failures(tree) == set()
