"""Loading an engine: every choice that can be refused is refused before a weight is read, in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megakernel import loading
from megakernel.loading import load_engine
from megakernel.memory import available_bytes, check_memory
from models.errors import UserError
from tests.support.configs import MAX_POSITION, save_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("gqa2", tmp_path_factory.mktemp("gqa2"), torch.bfloat16)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


def refused(monkeypatch: pytest.MonkeyPatch, model: str | Path, **options: object) -> str:
    """The message of a refusal; packing anything before it is an error."""

    def pack_nothing(*_: object) -> None:
        pytest.fail("weights were packed before the refusal")

    monkeypatch.setattr(loading, "pack", pack_nothing)
    monkeypatch.setattr(loading, "Weights", pack_nothing)
    with pytest.raises(UserError) as caught:
        load_engine(model, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(("backend", "name"), [("auto", "torch"), ("torch", "torch"), ("vm", "vm")])
def test_the_backends_that_need_no_gpu(backend: str, name: str, checkpoint: Path) -> None:
    seen: list[tuple[int, int]] = []
    with load_engine(checkpoint, backend, progress=lambda done, total: seen.append((done, total))) as engine:
        assert engine.backend_name == name
        assert engine.capacity == MAX_POSITION
        assert engine.config.vocab_size == 100
        assert len(list(engine.generate([1, 2, 3], 4))) == 4
    done, totals = [done for done, _ in seen], {total for _, total in seen}
    assert done == sorted(done) and done[0] == 0 and totals == {done[-1]}, "from nothing to all of it"


@pytest.mark.usefixtures("no_gpu")
def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    assert refused(monkeypatch, checkpoint, backend="gpu") == "no CUDA GPU found; use --backend torch"


@pytest.mark.usefixtures("hopper")
def test_a_gpu_of_another_kind(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    message = refused(monkeypatch, checkpoint, backend="gpu")
    assert message == "NVIDIA A100 has compute capability 8.0, the kernel needs 9.0 (H100, H200); use --backend torch"
    assert loading.choose_backend("auto") == "torch"


@pytest.mark.usefixtures("hopper")
def test_auto_with_a_hopper_gpu_takes_it() -> None:
    assert loading.choose_backend("auto") == loading.choose_backend("gpu") == "gpu"
    assert (loading.choose_backend("vm"), loading.choose_backend("torch")) == ("vm", "torch")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tpu"}, "unknown backend 'tpu': choose one of auto, gpu, torch, vm"),
        ({"dtype": "int8"}, "unknown dtype 'int8': choose one of auto, bfloat16, float32"),
        ({"capacity": 0}, f"a capacity of 0 tokens does not suit this model: choose 1 to {MAX_POSITION}"),
        ({"capacity": 257}, f"a capacity of 257 tokens does not suit this model: choose 1 to {MAX_POSITION}"),
        ({"sms": 0}, "0 SMs asked for"),
        ({"sms": 1000}, "1000 SMs asked for"),
        ({"backend": "torch", "sms": 4}, "4 SMs asked for, plain PyTorch schedules none: leave --sms out, or use --backend vm"),
        ({"policy": "none"}, "unknown placement policy 'none'; choose one of "),
    ],
)
def test_a_choice_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, options: dict[str, object], message: str
) -> None:
    assert refused(monkeypatch, checkpoint, **{"backend": "vm", **options}).startswith(message)


def test_a_model_that_does_not_fit_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 1B shape: 1.24e9 weights and 16 * 8 * 2 * 64 K and V values a position, 2 bytes each."""
    monkeypatch.setattr(loading, "available_bytes", lambda: 10**9)
    message = refused(monkeypatch, "random:llama-3.2-1b", backend="vm", capacity=40_000)
    parts = "weights 2.47, KV cache 1.31, largest tensor 0.53, activations 0.07"
    assert message.startswith(f"random:llama-3.2-1b needs 4.38 GB of memory ({parts}), 1.00 GB are available: ")


@pytest.mark.usefixtures("no_gpu")
def test_a_model_that_does_not_fit_the_memory_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and cache are those of the CPU machine's figures but for the tape's padding."""
    monkeypatch.setattr(loading, "available_bytes", lambda: 10**9)
    message = refused(monkeypatch, "random:llama-3.2-1b", backend="torch", capacity=40_000)
    parts = "weights 2.47, KV cache 1.31, largest tensor 0.53, activations 0.50"
    assert message.startswith(f"random:llama-3.2-1b needs 4.80 GB of memory ({parts}), 1.00 GB are available: ")


@pytest.mark.parametrize(("free", "kind"), [(10**9, "CUDA memory"), (None, "memory")])
def test_memory_of_a_device_and_of_the_host_are_asked_apart(
    monkeypatch: pytest.MonkeyPatch, free: int | None, kind: str
) -> None:
    """A device that does not say what is free is not asked; the largest tensor passes through the host."""
    monkeypatch.setattr(loading, "best_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(loading, "free_bytes", lambda device: free)
    monkeypatch.setattr(loading, "available_bytes", lambda: 10**8)
    message = refused(monkeypatch, "random:llama-3.2-1b", backend="torch")
    assert f" GB of {kind} (" in message and ("largest tensor" in message) == (free is None)


def test_memory_figures() -> None:
    needs = {"weights": 2 * 10**9, "KV cache": 10**9}
    check_memory("m", needs, 3 * 10**9)
    check_memory("m", needs, None)
    with pytest.raises(UserError, match=r"m needs 3.00 GB of memory \(weights 2.00, KV cache 1.00\), 2.99 GB are available"):
        check_memory("m", needs, 2_990_000_000)


def test_available_memory_is_read_from_meminfo(tmp_path: Path) -> None:
    meminfo = tmp_path / "proc" / "meminfo"
    meminfo.parent.mkdir()
    assert available_bytes(tmp_path) is None
    meminfo.write_text("MemTotal:       100 kB\nMemFree:  5 kB\nMemAvailable:    42 kB\n")
    assert available_bytes(tmp_path) == 42 * 1024
    meminfo.write_text("MemTotal:       100 kB\n")
    assert available_bytes(tmp_path) is None
    found = available_bytes()
    assert found is None or found > 2**20


def write_group(folder: Path, limit: object, usage: int, stat: str = "", *, version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, content in zip((*names, "memory.stat"), (limit, usage, stat), strict=True):
        (folder / name).write_text(f"{content}\n")


def in_group(root: Path, line: str) -> None:
    """A machine with 100 GB of memory, and a process in a control group."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text("MemAvailable: 100000000 kB\n")
    (root / "proc" / "self" / "cgroup").write_text(line + "\n")


def test_the_limit_of_a_container_counts(tmp_path: Path) -> None:
    """Of 2 GB, 1.5 are used; but 0.3 of these only cache files, which the kernel gives up first."""
    in_group(tmp_path, "0::/")
    group = tmp_path / "sys/fs/cgroup"
    cached = "anon 1000000000\ninactive_file 200000000\nactive_file 100000000\nshmem 5"
    write_group(group, 2_000_000_000, 1_500_000_000, cached)
    assert available_bytes(tmp_path) == 800_000_000
    write_group(group, 1_000_000_000, 1_500_000_000)
    assert available_bytes(tmp_path) == 0
    write_group(group, "max", 1_500_000_000)
    assert available_bytes(tmp_path) == 100_000_000 * 1024


def test_the_narrowest_of_all_groups_counts(tmp_path: Path) -> None:
    in_group(tmp_path, "0::/system.slice/a.service")
    mount = tmp_path / "sys/fs/cgroup"
    write_group(mount / "system.slice" / "a.service", 9_000_000_000, 1_000_000_000)
    write_group(mount / "system.slice", 6_000_000_000, 1_000_000_000)
    assert available_bytes(tmp_path) == 5_000_000_000


@pytest.mark.parametrize("folder", ["docker/0123", ""])
def test_the_first_version_of_control_groups(tmp_path: Path, folder: str) -> None:
    """Within a container the mount is the container's own group, whatever the path is called outside."""
    in_group(tmp_path, "9:cpu,cpuacct:/docker/0123\n4:memory:/docker/0123\n0::/docker/0123")
    mount = tmp_path / "sys/fs/cgroup/memory"
    write_group(mount, 2**63 - 4096, 5, version=1)
    write_group(mount / folder, 3_000_000_000, 1_000_000_000, "inactive_file 7\ntotal_inactive_file 400000000", version=1)
    assert available_bytes(tmp_path) == 2_400_000_000


def test_the_type_of_the_weights(checkpoint: Path) -> None:
    for dtype, expected in (("auto", torch.bfloat16), ("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        with load_engine(checkpoint, "vm", dtype=dtype, capacity=16) as engine:
            backend = engine._backend
            assert backend is not None and backend.model.dtype == expected  # type: ignore[attr-defined]
