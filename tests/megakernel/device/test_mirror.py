"""The kernel mirrors `instructions/` name by name, and both read one source of opcodes, word offsets and sizes.

Read from the source where the kernel's code cannot be run without a GPU: who is dispatched to whom, which word goes where.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction

from instructions.base import Instruction
from instructions.codec import MAX_SIGNALS, MAX_WAITS, WORDS, Word
from instructions.projection import Projection
from instructions.registry import INSTRUCTIONS
from instructions.shape import MMA_COLUMNS
from megakernel import control_block
from megakernel.control_block import Progress, Source
from megakernel.device import consumer, context, matvec, prefetcher, sampling, trace
from megakernel.device.formats import layouts, plain
from megakernel.geometry import ITEM_BYTES
from megakernel.stamps import Clock, Point
from models import tape
from tests.support import ROOT

DEVICE = ROOT / "megakernel" / "device"
# what an instruction is, what it is told, and how it is written down
HOST_ONLY = {"__init__", "base", "codec", "dimensions", "registry", "shape"}
ROLES = {"kernel", "consumer", "loader", "prefetcher"}
DEVICE_ONLY = ROLES | {
    "__init__",
    "cache",
    "clocks",
    "compat",
    "context",
    "draws",
    "heads",
    "numbers",
    "opaque",
    "pages",
    "stream",
    "sums",
    "sync",
    "trace",
    "values",
}  # the interpreter


def modules(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.py")}


def definition(module: ModuleType, name: str) -> Any:
    """A function or class of a device module, as a syntax tree."""
    body = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8")).body
    [found] = [node for node in body if getattr(node, "name", None) == name]
    return found


def constants(module: ModuleType) -> dict[str, Any]:
    """The compile-time constants of a device module, by name."""
    return {name: value.value for name, value in vars(module).items() if isinstance(value, gl.constexpr)}


def test_every_instruction_file_has_its_twin() -> None:
    assert modules(ROOT / "instructions") - HOST_ONLY == modules(DEVICE) - DEVICE_ONLY


@pytest.mark.parametrize("kind", INSTRUCTIONS, ids=lambda kind: kind.MNEMONIC)
def test_file_and_function_bear_the_instruction_s_name(kind: type[Instruction]) -> None:
    name = kind.__module__.rpartition(".")[2]
    assert name == kind.MNEMONIC
    twin = getattr(importlib.import_module(f"megakernel.device.{name}"), name)
    assert isinstance(twin, GluonJITFunction)
    assert twin.arg_names == ["S", "memory", "ring", "step"]
    doc = importlib.import_module(f"megakernel.device.{name}").__doc__ or ""
    assert f"`instructions.{name}`" in doc


def test_the_dispatch_has_every_opcode_once_and_calls_its_twin() -> None:
    called: dict[int, str] = {}
    known = constants(consumer)
    bodies = [definition(consumer, name) for name in ("execute", "execute_mixture")]
    branches = [node for body in bodies for node in ast.walk(body) if isinstance(node, ast.If)]
    for branch in branches:
        match branch.test:
            case ast.Compare(left=ast.Name(id="opcode"), ops=[ast.Eq()], comparators=[ast.Name(id=name)]):
                calls = [node.func for body in branch.body for node in ast.walk(body) if isinstance(node, ast.Call)]
                assert known[name] not in called, f"two branches for opcode {known[name]}"
                [called[known[name]]] = [call.id for call in calls if isinstance(call, ast.Name)]
    assert called == {kind.OPCODE: kind.MNEMONIC for kind in INSTRUCTIONS}


def test_the_prefetcher_knows_who_is_short() -> None:
    """By the bits of an int32 that it shifts right, so opcodes go up to 30."""
    assert all(0 < kind.OPCODE <= 30 for kind in INSTRUCTIONS)
    short = {kind.MNEMONIC for kind in INSTRUCTIONS if constants(prefetcher)["SHORT"] >> kind.OPCODE & 1}
    dense = {"embed", "attention", "combine", "o_proj", "gate_up", "sample", "hand_over"}
    assert short == dense | {"router", "choose", "expert_gate_up"}
    assert {kind.MNEMONIC for kind in INSTRUCTIONS if constants(prefetcher)["DENSE"] >> kind.OPCODE & 1} == dense


@pytest.mark.parametrize("name", sorted(set(Word.__members__) - {"LAGS"}))  # which the GPU gets in WAITS
def test_word_offsets_are_those_of_the_codec(name: str) -> None:
    assert constants(context)[name] == Word[name]


def test_a_record_has_as_many_words() -> None:
    """As many as a warp has lanes: each fetches one."""
    assert constants(context)["RECORD"] == WORDS == 32


def fetched(fetcher: str, record: str, by: str) -> dict[str, int]:
    """Which word of a record the kernel's `fetcher` puts into each field of `record`, each taken by the function `by`."""
    call: Any = definition(context, fetcher).body[-1].value
    assert call.func.id == record
    assert {ast.unparse(argument.func) for argument in call.args} == {by}
    words = [eval(ast.unparse(argument.args[1]), constants(context)) for argument in call.args]
    declared: Any = definition(context, record)
    assert [ast.unparse(decorator) for decorator in declared.decorator_list] == ["aggregate"], "takes its fields in their order"
    fields = [ast.unparse(node.target) for node in declared.body if isinstance(node, ast.AnnAssign)]
    return dict(zip(fields, words, strict=True))


def test_the_consumer_fetches_each_word_into_its_field() -> None:
    expected: dict[str, int] = {name.lower(): Word[name] for name in ("OPCODE", "LAYER", "PAGE", "PAGES", "WAITS")}
    expected |= {f"wait{j}": Word.WAIT + j for j in range(MAX_WAITS)}
    expected |= {f"target{j}": Word.TARGET + j for j in range(MAX_WAITS)}
    expected |= {f"signal{j}": Word.SIGNAL + j for j in range(MAX_SIGNALS)} | {"release": Word.RELEASE}
    most = max(len(kind.payload_names()) for kind in INSTRUCTIONS)
    expected |= {name: Word.PAYLOAD + j for j, name in enumerate("abcdefgh"[:most])}
    assert fetched("record_of", "Record", "taken") == expected


@pytest.mark.parametrize("kind", [*INSTRUCTIONS, Projection], ids=lambda kind: kind.__module__.rpartition(".")[2])
def test_payload_words_bear_the_names_of_the_host_s_fields(kind: type[Instruction]) -> None:
    """In a twin, a word a, b or c of the record is only ever given the name of the field that it holds, and nothing else is."""
    path = DEVICE / f"{kind.__module__.rpartition('.')[2]}.py"
    names = kind.payload_names()
    words = {f"step.record.{letter}": name for letter, name in zip("abc", names, strict=False)}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    taken = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            [target] = node.targets
            pair = (target, node.value)
            several = all(isinstance(part, ast.Tuple) for part in pair)
            pairs = zip(*(part.elts for part in pair), strict=True) if several else [pair]  # type: ignore[attr-defined]
            for left, right in pairs:
                if ast.unparse(right) in words or ast.unparse(left) in names:
                    assert ast.unparse(left) == words.get(ast.unparse(right))
                    taken.append(right)
    used = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("record")]
    assert {node.attr for node in used} <= {"layer", "pages", *"abc"}
    assert [node for node in used if node.attr in "abc" and node not in taken] == []


def test_the_loader_fetches_each_word_into_its_field() -> None:
    from instructions.attention import Attention

    expected: dict[str, int] = {"opcode": Word.OPCODE, "page": Word.PAGE, "pages": Word.PAGES, "tape": Word.TAPE}
    expected |= {"wait": Word.LOAD_WAIT, "target": Word.LOAD_TARGET}
    expected["slice"] = Word.PAYLOAD + Attention.payload_names().index("slice")
    assert fetched("fetch_load", "Load", "word") == expected


def test_pages_and_tiles_are_those_of_the_tape() -> None:
    found = constants(layouts) | constants(plain) | constants(matvec)
    assert found["TILES"] == tape.TILES_PER_PAGE
    assert found["ROWS"] == tape.BLOCK_ROWS
    assert found["TILE"] * ITEM_BYTES == tape.TILE_BYTES
    assert found["PAGE_COLUMNS"] * ITEM_BYTES == tape.TILES_PER_PAGE * tape.TILE_BYTES
    assert found["PAGE_ELEMENTS"] * ITEM_BYTES == found["LINES"] * tape.TILE_BYTES == tape.PAGE_BYTES


def test_random_numbers_have_one_set_of_constants() -> None:
    from instructions import sampling as host

    found = constants(sampling)
    assert [found[name] for name in ("M0", "M1", "W0", "W1", "ROUNDS")] == [*host.PHILOX_M, *host.PHILOX_W, host.PHILOX_ROUNDS]


def test_time_stamps_are_those_of_the_host() -> None:
    found = constants(trace)
    assert {point.name: found[point.name] for point in Point} == {point.name: int(point) for point in Point}
    assert found["POINTS"] == len(Point)
    assert {clock.name: found[clock.name] for clock in Clock} == {clock.name: int(clock) for clock in Clock}
    assert found["CLOCKS"] == len(Clock)


def test_no_size_is_typed_into_a_device_function() -> None:
    """Sizes come from a geometry or from a named constant.  Numbers up to a warp's 32 lanes are layouts, tests of bits and the
    like; larger ones are the extremes of int32."""
    typed = []
    for path in sorted(DEVICE.glob("*.py")):
        for top in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(top, ast.FunctionDef):
                numbers = [node.value for node in ast.walk(top) if isinstance(node, ast.Constant)]
                typed += [f"{path.name} {top.name} {n}" for n in numbers if isinstance(n, int) and 32 < n < 2**31 - 1]
    assert typed == []


def test_records_of_sequences_are_those_of_the_host() -> None:
    """Every word by its name, and no record reaches into the next."""
    found = constants(context)
    assert {word.name: found[word.name] for word in Progress} == {word.name: int(word) for word in Progress}
    assert found["GIVEN"] == Source.GIVEN
    assert (found["SEQUENCES"], found["SEQUENCE_WORDS"]) == (control_block.SEQUENCES, control_block.SEQUENCE_WORDS)
    assert len(Progress) <= control_block.REQUEST == control_block.REPORTS, "a request has the words that `Control` has"
    assert 2 * control_block.REQUEST <= control_block.SEQUENCE_WORDS
    last = control_block.SEQUENCES + control_block.MOST_SEQUENCES * control_block.SEQUENCE_WORDS
    assert control_block.MOST_SEQUENCES == MMA_COLUMNS and last == control_block.CONTROL_WORDS


def test_drafts_have_one_set_of_constants() -> None:
    from instructions import drafts as host
    from megakernel.device import drafts

    found = constants(drafts)
    assert [found[name] for name in ("LEAST", "MOST", "WINDOW")] == [host.LEAST, host.MOST, host.WINDOW]
    assert (found["MOST"] + 1) * 2 * found["WINDOW"] < 2**31, "a key holds how many agree and where"


@pytest.mark.parametrize("path", sorted(DEVICE.rglob("*.py")), ids=lambda path: str(path.relative_to(DEVICE)))
def test_a_stamp_names_a_point_of_the_trace(path: Path) -> None:
    """And no number of the same name that the module has of its own."""
    tree = ast.parse(path.read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "stamp"]
    points = {node.args[2].id for node in calls if isinstance(node.args[2], ast.Name)}
    assert len(points) > 0 or not calls
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == trace.__name__
        for alias in node.names
    }
    own = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    own |= {argument.arg for argument in ast.walk(tree) if isinstance(argument, ast.arg)}
    assert points <= imported - own
