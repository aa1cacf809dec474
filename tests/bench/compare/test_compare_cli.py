"""What the command line takes and refuses, prompts, checkpoints of made-up weights, and records put together."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.compare import cli
from bench.compare.charts import draw, longest_bar
from bench.compare.engines import BASELINE, REGISTRY, ROOT, select, worker_environment
from bench.compare.fidelity import Distances
from bench.compare.floor import measure
from bench.compare.plan import Plan
from bench.compare.prompts import Prompts, draw_prompts
from bench.compare.summary import rows
from bench.record import fingerprint
from models.checkpoint import open_checkpoint
from models.config import ModelConfig
from models.families import PRESETS
from models.hf_config import read_config
from models.random_weights import RandomWeights
from models.weights import Weights, parameter_count
from tests.support.compare_cases import engine, record, run, save_small

SMALL = ModelConfig(64, 96, 2, 4, 2, 16, 100, tied_embeddings=True, max_position=64, bos_token_id=1, eos_token_ids=(2,))


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("small"))


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which bad input ends."""
    assert cli.main(list(arguments)) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--model DIR"),
        (["--model", "/no/such/model"], "/no/such/model"),
        (["--model", "random:llama-3.2-2b"], "no such preset"),
        (["--model", "random:smollm2-135m", "--text", "/no/such/text"], "tokenizer.json"),
        (["--merge", "/no/such/record.json"], "/no/such/record.json"),
        (["--model", "MODEL", "--engines", "vllm,llamacpp"], "llamacpp"),
        (["--model", "MODEL", "--engines", ","], "no engine"),
        (["--model", "MODEL", "--engine", "vllm"], "NAME=PYTHON"),
        (["--model", "MODEL", "--engine", "vllm=python3:/no/such/folder"], "/no/such/folder"),
        (["--model", "MODEL", "--contexts", "32,many"], "32,many"),
        (["--model", "MODEL", "--contexts", "1"], "at least 2 tokens"),
        (["--model", "MODEL", "--tokens", "1"], "at least 2 tokens"),
        (["--model", "MODEL", "--contexts", "250", "--tokens", "10"], "256 positions"),
        (["--model", "MODEL", "--contexts", "8", "--text", "/no/such/text"], "tokenizer.json"),
    ],
)
def test_bad_input_ends_with_one_line(
    arguments: list[str], named: str, small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(small_checkpoint) if argument == "MODEL" else argument for argument in arguments]
    assert named in refusal(capsys, *given, "--output", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_every_engine_names_an_adapter_that_needs_no_library_to_import() -> None:
    """Its requirements are met in its own Python only, so making the adapter with its settings takes the standard library
    alone."""
    makers = [f"pkgutil.resolve_name({spec.adapter!r})(**{spec.settings!r})" for spec in REGISTRY]
    code = "import pkgutil, sys\n" + "\n".join(makers)
    code += "\nprint(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert len({spec.name for spec in REGISTRY}) == len({spec.label for spec in REGISTRY}) == len(REGISTRY)
    assert BASELINE in {spec.name for spec in REGISTRY} and all(spec.install for spec in REGISTRY)


def test_choosing_engines_and_their_pythons(tmp_path: Path) -> None:
    assert [spec.name for spec in select(None, [], quick=False)] == [spec.name for spec in REGISTRY]
    assert [spec.name for spec in select(None, [], quick=True)] == ["megakernel", "transformers-eager", "cuda-graph"]
    link = tmp_path / "python"
    link.symlink_to(sys.executable)
    ours, vllm, own = select("megakernel", [f"vllm={link}:{tmp_path}", f"my.adapter:Mine={link}"], quick=False)
    assert (ours.python, ours.site) == (sys.executable, "")
    assert (vllm.name, vllm.python, vllm.site) == ("vllm", str(link), str(tmp_path)), "the link stays: it is the environment"
    assert (own.adapter, own.label) == ("my.adapter:Mine", "my.adapter:Mine")
    environment = worker_environment(vllm)
    assert environment["PYTHONPATH"].split(os.pathsep)[:2] == [str(tmp_path), str(ROOT)]
    assert environment["HF_HUB_OFFLINE"] == "1" and environment["VLLM_NO_USAGE_STATS"] == "1"


def test_prompts_are_the_same_for_the_same_seed() -> None:
    drawn = draw_prompts(SMALL, (8, 30), 3, 5, seed=1)
    assert drawn == draw_prompts(SMALL, (8, 30), 3, 5, seed=1) != draw_prompts(SMALL, (8, 30), 3, 5, seed=2)
    assert drawn.digest != draw_prompts(SMALL, (8, 30), 3, 5, seed=2).digest
    assert [len(prompt) for prompt in (*drawn.timed, *drawn.scored)] == [8, 30, 5, 5, 5]
    assert all(prompt[0] == 1 and max(prompt) < 100 for prompt in (*drawn.timed, *drawn.scored))


def test_prompts_leave_out_special_tokens_at_the_end_of_the_vocabulary() -> None:
    """Llama 3's begin at 128000 of 128256."""
    [prompt] = draw_prompts(PRESETS["llama-3.2-1b"], (20000,), 0, 0, seed=0).timed
    assert prompt[0] == 128000 and 127900 < max(prompt[1:]) < 128000


def test_prompts_from_a_text(tmp_path: Path) -> None:
    """The bundled model has a tokenizer: its pieces, put together, are the text's beginning."""
    from tokenizers import Tokenizer

    model = ROOT / "models" / "bundled"
    text = tmp_path / "text"
    text.write_text("def average(values):\n    return sum(values) / len(values)\n" * 40)
    config = read_config(model)
    prompts = cli.make_prompts(Plan(model, config, Prompts((), ()), contexts=(8, 20)), text)
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text.read_text(), add_special_tokens=False).ids
    begun = 0 if config.bos_token_id is None else 1
    pieces = [prompt[begun:] for prompt in (*prompts.timed, *prompts.scored)]
    places = [0, 8, 28, *(28 + cli.SCORED_LENGTH * index for index in range(1, cli.SCORED_PROMPTS))]
    for piece, place in zip(pieces, places, strict=True):
        assert list(piece) == ids[place + begun : place + begun + len(piece)]


def test_bytes_of_a_decode_step() -> None:
    """Llama-3.2-1B: 1.236 B weights, all read; 2 * 16 layers * 8 heads * 64 dimensions * 2 bytes of K and V a position.
    An embedding that is not the head is not read."""
    plan = Plan(Path("m"), PRESETS["llama-3.2-1b"], Prompts((), ()), contexts=(100,), tokens=20)
    assert plan.weight_bytes == 2 * parameter_count(PRESETS["llama-3.2-1b"]) == 2471628800
    assert plan.step_bytes(100) - plan.weight_bytes == 110 * 32768
    large = Plan(Path("m"), PRESETS["llama-3-8b"], Prompts((), ()))
    assert large.weight_bytes == 2 * (parameter_count(large.config) - 128256 * 4096)


def test_bytes_of_a_decode_step_with_experts() -> None:
    """Qwen3-30B-A3B: of each layer's 128 experts, three matrices of 2048 by 768, a token takes 8."""
    plan = Plan(Path("m"), PRESETS["qwen3-30b-a3b"], Prompts((), ()))
    idle = 48 * 120 * 3 * 2048 * 768
    assert plan.weight_bytes == 2 * (parameter_count(plan.config) - 151936 * 2048 - idle) == 6083735552


def test_the_capacity_holds_the_longest_sequence() -> None:
    plan = Plan(Path("m"), PRESETS["llama-3.2-1b"], Prompts(((0,) * 4096,), ()))
    assert plan.load_spec.capacity == 4352  # 4096 + 128 + 64, in steps of 128
    small = Plan(Path("m"), SMALL, Prompts((), ()), contexts=(40,), tokens=20)
    assert small.load_spec.capacity == SMALL.max_position


def test_made_up_weights_are_a_checkpoint_that_transformers_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In several shards, because at true size there are several."""
    import transformers

    monkeypatch.setitem(PRESETS, "llama-3.2-1b", SMALL)
    monkeypatch.setattr(cli, "SHARD_BYTES", 50_000)
    directory = tmp_path / "model"
    assert cli.main(["--write-random", str(directory)]) == 0
    assert len(list(directory.glob("*.safetensors"))) > 1
    checkpoint = open_checkpoint(directory)
    assert checkpoint.config == SMALL
    model = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    loaded = dict(model.named_parameters())
    for name, tensor in Weights.collect(RandomWeights(SMALL)).tensors():
        assert torch.equal(loaded[name], tensor), name
    capsys.readouterr()
    assert "not empty" in refusal(capsys, "--write-random", str(directory))


def test_fingerprints_tell_checkpoints_apart(small_checkpoint: Path, tmp_path: Path) -> None:
    copied = tmp_path / "model"
    copied.mkdir()
    for path in small_checkpoint.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    assert fingerprint(copied) == fingerprint(small_checkpoint)
    weights = copied / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert fingerprint(copied) != fingerprint(small_checkpoint)


def saved(path: Path, found: dict[str, Any]) -> str:
    path.write_text(json.dumps(found))
    return str(path)


def test_merging_like_with_like(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judged = Distances((1e-4,) * 4, (1.0,) * 4, (1.0,) * 4, (True,) * 4)
    first = record(run([engine("a", "Engine A", [2.0, 2.1], list(judged.kl))]))
    second = record(run([engine("a", "Engine A", [2.2, 2.3], None), engine("b", "Engine B", [4.0], list(judged.kl))]))
    one, two = saved(tmp_path / "1.json", first), saved(tmp_path / "2.json", second)
    output = tmp_path / "out"
    assert cli.main(["--merge", one, two, "--output", str(output)]) == 0
    text = capsys.readouterr().out
    assert text.count("| Engine A ") == 4 and text.count("| Engine B ") == 4  # two contexts, fidelity, start
    assert "Engine A, prompt of 8: run 2 took 1.098 of run 1's time" in text
    assert json.loads(text.splitlines()[-1])["milliseconds_per_token"]["b"] == {"8": 4.0, "16": 5.0}
    assert len(json.loads((output / "comparison.json").read_text())["runs"]) == 2


@pytest.mark.parametrize(
    ("place", "what"),
    [(("machine", "gpu"), "GPU"), (("model", "fingerprint"), "checkpoint"), (("settings", "tokens"), "tokens"),
     (("settings", "prompts"), "prompts"), (("settings", "batch"), "batch")],
)  # fmt: skip
def test_only_like_is_merged(place: tuple[str, str], what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = record(run([engine("a", "A", [2.0], None)]))
    second = copy.deepcopy(first)
    second["runs"][0][place[0]][place[1]] = "another"
    one, two = saved(tmp_path / "1.json", first), saved(tmp_path / "2.json", second)
    assert f"{two}: {what} is another" in refusal(capsys, "--merge", one, two)


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": 0, "runs": [{}]}', '{"schema": 1, "runs": []}'])
def test_what_is_no_record_is_refused(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.json"
    path.write_text(content)
    assert str(path) in refusal(capsys, "--merge", str(path))


def test_charts_of_records_with_and_without_scores(tmp_path: Path) -> None:
    scored = record(run([engine(BASELINE, "Base", [30.0], [1e-4] * 4), engine("b", "B", [2.0], [5e-4] * 4)]))
    assert [path.name for path in draw(scored, tmp_path)] == ["latency.png", "latency.svg", "fidelity.png", "fidelity.svg"]
    before = (tmp_path / "latency.svg").read_bytes()
    draw(scored, tmp_path)
    assert (tmp_path / "latency.svg").read_bytes() == before, "the same record draws the same file"
    unscored = record(run([engine("b", "B", [2.0], None)]))
    assert [path.name for path in draw(unscored, tmp_path)] == ["latency.png", "latency.svg"]
    assert draw(record(run([])), tmp_path) == []


def test_bars_are_cut_by_the_fastest_of_the_faithful(tmp_path: Path) -> None:
    """One that reads a fraction of the bytes does not have all others cut."""
    engines = [engine(BASELINE, "Base", [30.0], [1e-4] * 8), engine("b", "B", [2.0], [1e-4] * 8)]
    fewer_bits = engine("c", "C", [0.3], [0.5] * 8)

    def limit(*found: dict[str, Any]) -> float:
        return longest_bar([(row, entry) for row in rows(record(run([*found]))["runs"]) for entry in row.speeds])

    assert limit(*engines) == limit(*engines, fewer_bits) < 20
    assert limit(fewer_bits) < 2, "by itself it is drawn as any other"


def test_no_floor_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert measure(1 << 20) == {"bytes_per_second": None, "milliseconds": {}}
