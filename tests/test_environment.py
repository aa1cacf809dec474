"""The set-up of scripts/environment.py, with its commands recorded in place of executed: what it does on which machine, and
that an environment which is not whole is never trusted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from environment import CPU_INDEX, CPU_TORCH, INDEX_TORCH, SECOND_TRITON, Environment, SetupError


class Machine:
    """Stands for `subprocess.run`: records commands, makes `bin/python` for `-m venv`, and fails where it is told to."""

    def __init__(self, fails: Callable[[str], bool] = lambda command: False) -> None:
        self.commands: list[str] = []
        self.fails = fails

    def __call__(self, command: Sequence[str]) -> bool:
        line = " ".join(command)
        self.commands.append(line)
        if self.fails(line):
            return False
        if "-m venv" in line:
            python = Path(command[-1]) / "bin" / "python"
            python.parent.mkdir()
            python.touch(0o755)
        return True

    def ran(self, *words: str) -> bool:
        return any(all(word in command.split() for word in words) for command in self.commands)


def set_up(directory: Path, machine: Machine, dev: bool = False, gpu: bool = False, parts: Sequence[str] = ()) -> None:
    Environment(directory, gpu, machine).ensure(*parts, *(["dev"] if dev else []))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "venv"


def test_the_second_start_runs_nothing(directory: Path) -> None:
    set_up(directory, Machine(), dev=True)
    for dev in (True, False):
        again = Machine()
        set_up(directory, again, dev=dev)
        assert again.commands == []


def test_tests_add_to_the_environment_of_a_run(directory: Path) -> None:
    first, second = Machine(), Machine()
    set_up(directory, first)
    assert not first.ran(f"triton=={SECOND_TRITON}")
    set_up(directory, second, dev=True)
    assert second.ran(f"triton=={SECOND_TRITON}", "--target", "--no-deps")
    assert not second.ran("venv"), "what is whole must not be made anew"


@pytest.mark.parametrize(("part", "package"), [("serve", "uvicorn"), ("chat", "prompt-toolkit")])
def test_a_part_adds_what_its_extra_lists(directory: Path, part: str, package: str) -> None:
    first, second, third = Machine(), Machine(), Machine()
    set_up(directory, first)
    assert package not in " ".join(first.commands)
    set_up(directory, second, parts=[part])
    assert package in " ".join(second.commands) and not second.ran("venv")
    set_up(directory, third, parts=[part])
    assert third.commands == []


def test_without_a_driver_the_cpu_build_is_taken(directory: Path) -> None:
    machine = Machine()
    set_up(directory, machine, gpu=False)
    assert machine.ran(CPU_TORCH, CPU_INDEX)
    assert not machine.ran(INDEX_TORCH)


def test_without_a_cpu_build_the_one_of_the_package_index_is_taken(directory: Path) -> None:
    machine = Machine(fails=lambda command: CPU_TORCH in command)
    set_up(directory, machine, gpu=False)
    assert machine.ran(INDEX_TORCH)


def test_with_a_driver_the_build_of_the_package_index_is_taken(directory: Path) -> None:
    machine = Machine()
    set_up(directory, machine, gpu=True)
    assert machine.ran(INDEX_TORCH)
    assert not machine.ran(CPU_TORCH)


@pytest.mark.parametrize("interrupted_at", range(4))
def test_an_interrupted_set_up_is_not_trusted(directory: Path, interrupted_at: int) -> None:
    """Stopped at each of its four commands in turn: the next start begins from an empty folder."""
    machine = Machine()

    def stop(command: str) -> bool:
        if len(machine.commands) > interrupted_at:
            raise KeyboardInterrupt
        return False

    machine.fails = stop
    with pytest.raises(KeyboardInterrupt):
        set_up(directory, machine)
    (directory / "half-installed").touch()
    whole = Machine()
    set_up(directory, whole)
    assert len(whole.commands) == 4, "one for the folder, three for pip, torch and the rest: see the parameter above"
    assert not (directory / "half-installed").exists()


def test_failing_dev_tools_leave_nothing_that_is_trusted(directory: Path) -> None:
    set_up(directory, Machine())
    with pytest.raises(SetupError, match="triton"):
        set_up(directory, Machine(fails=lambda command: "--target" in command), dev=True)
    assert Environment(directory, False).installed() == set()


def test_other_pins_make_it_anew(directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_up(directory, Machine())
    pins = tmp_path / "constraints.txt"
    pins.write_text("numpy==0.0.0\n")
    monkeypatch.setattr("environment.CONSTRAINTS", pins)
    anew = Machine()
    set_up(directory, anew)
    assert anew.ran("venv")


def test_somebody_elses_folder_is_left_alone(directory: Path) -> None:
    directory.mkdir()
    (directory / "precious").touch()
    machine = Machine()
    with pytest.raises(SetupError, match="MEGAKERNEL_VENV"):
        set_up(directory, machine)
    assert machine.commands == [] and (directory / "precious").exists()
