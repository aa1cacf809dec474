"""What must agree between the project's own files: versions that are written down more than once, links, commands."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.support import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DOCUMENTS = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/results/README.md"),
    *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md")),
]
FOLDERS = (
    *("models", "instructions", "scheduler", "megakernel", "serving", "chat"),
    *("bench", "tests", "scripts", "docs", "examples"),
)
MARKDOWN = ("README.md", "CONTRIBUTING.md", "docs/**/*.md", "bench/**/*.md")  # but the changelog: it tells of what is no more
PAGES = sorted(str(path.relative_to(ROOT)) for pattern in MARKDOWN for path in ROOT.glob(pattern))


def constraints() -> dict[str, str]:
    lines = (ROOT / "scripts" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.lower().replace("_", "-").split("==") for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("tool", ["ruff", "mypy"])
def test_one_version_of_each_tool(tool: str) -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    [hook] = [repo["rev"].removeprefix("v") for repo in hooks if tool in repo["repo"]]
    [pin] = [line.partition("==")[2] for line in PROJECT["optional-dependencies"]["dev"] if line.startswith(tool + "==")]
    assert hook == pin == constraints()[tool]


def test_constraints_pin_every_requirement() -> None:
    """All but torch, of which scripts/environment.py chooses the build."""
    wanted = [*PROJECT["dependencies"], *(line for extra in PROJECT["optional-dependencies"].values() for line in extra)]
    names = {re.split(r"[^\w-]", line)[0].lower() for line in wanted}
    assert names - constraints().keys() == {"torch"}


def test_the_changelog_has_a_section_for_this_version() -> None:
    assert f"## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """What may follow # in a link to a page: its headings as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / document).read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)", text) + re.findall(r'(?:src|srcset|href)="([^"]+)"', text)
    for link in links:
        if not link.startswith(("http://", "https://")):
            name, _, anchor = link.partition("#")
            page = (ROOT / document).parent / name if name else ROOT / document
            assert page.exists(), link
            assert not anchor or anchor in anchors(page), link


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_exists(page: str) -> None:
    """Files and folders of the project, and modules that are commands; `*` and `<name>` stand for many."""
    text = (ROOT / page).read_text(encoding="utf-8")
    paths = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./*-]*)`", text)
    missing = [path for path in paths if not any(ROOT.glob(path.rstrip("/")))]
    modules = re.findall(rf"python -m ((?:{'|'.join(FOLDERS)})(?:\.\w+)*)", text)
    files = {name: ROOT.joinpath(*name.split(".")) for name in modules}
    gone = [name for name, file in files.items() if not (file.with_suffix(".py").exists() or (file / "__main__.py").exists())]
    assert missing == [] and gone == []


def test_the_folders_of_the_tests_are_packages() -> None:
    """Else two files of one name, in two folders, are one module."""
    folders = {path.parent for path in (ROOT / "tests").rglob("*.py")}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_the_table_of_options_is_that_of_the_command_line() -> None:
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("<!-- options")[1].split("<!-- /options -->")[0]
    shown = subprocess.run([sys.executable, ROOT / "run_llama1b.py", "--help"], capture_output=True, text=True, check=True)
    documented = set(re.findall(r"^\| `(--[\w-]+)", table, flags=re.MULTILINE))
    assert documented == set(re.findall(r"(?<![\w-])--[a-z][\w-]*", shown.stdout))
