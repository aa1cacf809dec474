"""Builds the wheel, installs it into an environment of its own, and uses it there: every package imports, the bundled model and
what drawings are made with are whole, the command starts, and what only a checkout runs was left out.

The new environment sees the libraries of the one that runs this file, so nothing is downloaded but what builds the wheel.
"""

from __future__ import annotations

import filecmp
import shutil
import site
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ("models/bundled", "scheduler/draw/assets", "serving/assets")
PACKAGES = ("models", "instructions", "scheduler", "megakernel", "serving", "chat", "llama_megakernel", "run_llama1b")
LEFT_OUT = ("bench", "tests", "scripts", "examples")  # a checkout runs them


def build(folder: Path) -> Path:
    """The wheel, built from a copy: setuptools leaves files in its source folder, and reads what earlier builds left there."""
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__"))
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(source)], check=True, stdout=subprocess.DEVNULL
    )
    [wheel] = folder.glob("*.whl")
    return wheel


def install(wheel: Path, environment: Path) -> Path:
    """Install the wheel, and it alone, into a new environment; returns its folder of packages."""
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-qq", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True)
    [packages] = environment.glob("lib/python3*/site-packages")
    (packages / "libraries.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return packages


def check(environment: Path, packages: Path) -> None:
    for file in sorted(path for folder in DATA for path in (ROOT / folder).iterdir()):
        installed = packages / file.relative_to(ROOT)
        if not installed.exists() or not filecmp.cmp(file, installed, shallow=False):
            raise SystemExit(f"the wheel lacks {file.relative_to(ROOT)}, or has another one")
    if packed := [name for name in LEFT_OUT if (packages / name).exists()]:
        raise SystemExit(f"the wheel holds {', '.join(packed)}, which only a checkout runs")
    script = f"""
import importlib, pathlib
for name in {PACKAGES!r}:
    file = pathlib.Path(importlib.import_module(name).__file__)
    assert file.is_relative_to({str(packages)!r}), f"{{name}} was imported from {{file}}"
"""
    python = environment / "bin" / "python"
    subprocess.run([str(python), "-c", script], check=True, cwd=environment)
    [command] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    subprocess.run([environment / "bin" / command, "--help"], check=True, cwd=environment, stdout=subprocess.DEVNULL)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = build(folder)
        check(folder / "venv", install(wheel, folder / "venv"))
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, installs, imports and starts")


if __name__ == "__main__":
    main()
