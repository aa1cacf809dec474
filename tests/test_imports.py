"""Imports point one way: models -> instructions -> scheduler -> megakernel -> scripts; and within them nowhere in a circle.
Right of all stands the command that starts the others.

Read from the source, so that an import inside a function counts as well, and one of a package that is not installed.  The
reader itself is tested with planted violations.  The last test imports everything, and so sees what no reader can.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import networkx as nx
import pytest

from tests.support import ROOT

LAYERS = ("models", "instructions", "scheduler", "megakernel")
SCRIPTS = ("bench", "run_llama1b", "serving", "chat")  # stand right of all layers, and know nothing of each other
COMMAND = "llama_megakernel"  # starts any of them
OURS = {*LAYERS, *SCRIPTS, COMMAND, "tests"}
WITH_EXTRA = {"serving": "serve", "chat": "chat"}  # packages that are there for an extra: they import it anywhere
WITHOUT_GPU = ("instructions", "scheduler")
UNREADABLE = "<computed>"
GUESTS = {"vllm", "sglang"}  # bench.compare runs them in Pythons of their own, whose packages are the user's affair
MAY_COMPUTE = {
    "models/bundled_corpus.py",  # reads the documentation of every module of the standard library
    "llama_megakernel.py",  # imports the module of the command that was named
}


def allowed(package: str) -> set[str]:
    """The packages of ours that modules of this one may import."""
    if package == COMMAND:
        return OURS - {"tests"}
    left = LAYERS[: LAYERS.index(package) + 1] if package in LAYERS else LAYERS
    return {package, *left}


def sources(package: str, root: Path = ROOT) -> list[Path]:
    module = root / f"{package}.py"
    return [module] if module.exists() else sorted((root / package).rglob("*.py"))


def imported_names(path: Path, root: Path = ROOT) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import in a file, wherever it stands, `import_module` included."""
    package = list(path.relative_to(root).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}".strip(".")) for alias in node.names)
        elif isinstance(node, ast.Call) and called_name(node) in ("import_module", "__import__"):
            yield node.lineno, dynamic_target(node, package)


def called_name(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def dynamic_target(node: ast.Call, package: list[str]) -> str:
    """The module that `import_module(...)` names, up to the first part known only at run time."""
    first = node.args[0] if node.args else None
    if isinstance(first, ast.JoinedStr):
        first = first.values[0]
    if not isinstance(first, ast.Constant) or not isinstance(first.value, str):
        return UNREADABLE
    dots = len(first.value) - len(first.value.lstrip("."))
    above = package[: len(package) - dots + 1] if dots else []
    return ".".join([*above, first.value.lstrip(".")]).strip(".")


def wrong_way(package: str, root: Path = ROOT) -> list[str]:
    """Imports in this package of ours that it must not make: of a package right of it, or of one that cannot be read."""
    forbidden = {*OURS - allowed(package), UNREADABLE}
    return [
        f"{path.relative_to(root)}:{line} imports {name}"
        for path in sources(package, root)
        for line, name in imported_names(path, root)
        if name.split(".")[0] in forbidden and not (name == UNREADABLE and str(path.relative_to(root)) in MAY_COMPUTE)
    ]


def gpu_uses(path: Path, root: Path = ROOT) -> list[str]:
    """Imports of Triton or of torch.cuda in a file, and any `torch.cuda.…` or `.cuda()` written out."""
    found = [(line, name) for line, name in imported_names(path, root) if re.match(r"(triton|torch\.cuda)(\.|$)", name)]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr == "cuda":
            found.append((node.lineno, ast.unparse(node)))
    return [f"{path.relative_to(root)}:{line} uses {name}" for line, name in found]


def for_types_only(path: Path) -> set[int]:
    """The lines of a file that only a type checker reads."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    return {inner.lineno for block in blocks for inner in ast.walk(block) if isinstance(inner, ast.stmt)}


def circles(packages: Iterable[str], root: Path = ROOT) -> list[list[str]]:
    """Modules of these packages that import each other, however indirectly, in functions too; not for annotations."""
    paths = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for package in packages
        for path in sources(package, root)
    }
    graph = nx.DiGraph()
    for module, path in paths.items():
        skipped = for_types_only(path)
        for line, name in imported_names(path, root):
            target = name if name in paths else name.rpartition(".")[0]  # of `from a import b` b is a module or what a holds
            if target in paths and line not in skipped:
                graph.add_edge(module, target)
    rings = [sorted(ring) for ring in nx.strongly_connected_components(graph) if len(ring) > 1]
    return sorted([*rings, *([module] for module in nx.nodes_with_selfloops(graph))])


def test_no_module_imports_itself_by_a_detour() -> None:
    assert circles((*LAYERS, *SCRIPTS, COMMAND)) == []


BACK = ("from models import one", "def lazy():\n    from models.one import number", "import models.one")


@pytest.mark.parametrize("back", BACK)
def test_a_planted_circle_is_found(tmp_path: Path, back: str) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "__init__.py").write_text("from models.one import number\n")
    (folder / "one.py").write_text("from models.two import number\n")
    (folder / "two.py").write_text("from models import three\nif TYPE_CHECKING:\n    from models.one import number\n")
    (folder / "three.py").write_text("number = 3\n")
    assert circles(["models"], tmp_path) == [], "what is needed for annotations only must pass"
    (folder / "three.py").write_text(back + "\n")
    assert circles(["models"], tmp_path) == [["models.one", "models.three", "models.two"]]


@pytest.mark.parametrize("package", [*LAYERS, *SCRIPTS, COMMAND])
def test_imports_point_one_way(package: str) -> None:
    assert sources(package), f"{package} has no source file: the test would check nothing"
    assert wrong_way(package) == []


@pytest.mark.parametrize("package", WITHOUT_GPU)
def test_no_gpu_left_of_the_megakernel(package: str) -> None:
    assert [use for path in sources(package) for use in gpu_uses(path)] == []


@pytest.mark.parametrize(
    "statement",
    [
        "import scheduler",
        "import scheduler.place as place",
        "from scheduler.place import place",
        "from scheduler import place",
        "def lazy():\n    import megakernel.engine",
        "if TYPE_CHECKING:\n    from bench import load",
        "from ... import megakernel",
        "from ...megakernel import engine",
        "import importlib\nimportlib.import_module('run_llama1b')",
        "import_module(f'megakernel.{name}')",
        "import_module('...scheduler', __package__)",
        "__import__('tests')",
        "import_module(name)",
    ],
)
def test_a_planted_import_is_found(tmp_path: Path, statement: str) -> None:
    """In instructions/deep/planted.py, where models and instructions are the only packages of ours that may be imported."""
    planted = tmp_path / "instructions" / "deep" / "planted.py"
    planted.parent.mkdir(parents=True)
    planted.write_text("from models import tape\nfrom .. import base\nfrom . import sibling\nimport numpy\n")
    assert wrong_way("instructions", tmp_path) == [], "what is allowed must pass"
    with planted.open("a") as file:
        file.write(statement + "\n")
    assert len(wrong_way("instructions", tmp_path)) == 1


@pytest.mark.parametrize(
    "statement",
    ["import triton", "from triton.experimental import gluon", "from torch import cuda", "import torch.cuda",
     "def lazy():\n    return torch.cuda.is_available()", "tensor = tensor.cuda()"],
)  # fmt: skip
def test_a_planted_gpu_use_is_found(tmp_path: Path, statement: str) -> None:
    planted = tmp_path / "scheduler" / "planted.py"
    planted.parent.mkdir()
    planted.write_text("import torch\nimport networkx\ncuda_cores = torch.ones(3)\n")
    assert gpu_uses(planted, tmp_path) == [], "torch on the CPU must pass"
    with planted.open("a") as file:
        file.write(statement + "\n")
    assert len(gpu_uses(planted, tmp_path)) == 1


def names_of(*requirements: str) -> set[str]:
    """The import names of requirements such as "huggingface-hub>=0.30"."""
    return {re.split(r"[^\w-]", line)[0].replace("-", "_").lower() for line in requirements}


def test_every_import_is_declared() -> None:
    """What the wheel imports stands in pyproject.toml: a dependency, that of the extra which a package is for, or for an import
    inside a function any extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = names_of(*project["dependencies"]) | set(sys.stdlib_module_names) | OURS | {UNREADABLE}
    extras = names_of(*(line for extra in project["optional-dependencies"].values() for line in extra)) | GUESTS
    unknown = []
    for package, path in [(name, path) for name in (*LAYERS, *SCRIPTS, COMMAND) for path in sources(name)]:
        at_hand = known | names_of(*project["optional-dependencies"].get(WITH_EXTRA.get(package, ""), ()))
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, name in imported_names(path):
            lazy = lines[number - 1].startswith(" ")
            if name.split(".")[0] not in (at_hand | extras if lazy else at_hand):
                unknown.append(f"{path.relative_to(ROOT)}:{number} imports {name}")
    assert unknown == []


def test_layers_load_without_those_right_of_them() -> None:
    """Import every module of one layer after the other, and look each time at what came along."""
    script = f"""
import importlib, pkgutil, sys
layers = {LAYERS[:3]!r}
for index, layer in enumerate(layers):
    package = importlib.import_module(layer)
    for module in pkgutil.walk_packages(package.__path__, layer + "."):
        importlib.import_module(module.name)
    loaded = {{name.split(".")[0] for name in sys.modules}}
    strangers = loaded & ({OURS!r} - set(layers[: index + 1]) | {{"triton"}})
    assert not strangers, f"importing {{layer}} also imported {{sorted(strangers)}}"
if "torch" in sys.modules:
    assert not sys.modules["torch"].cuda.is_initialized(), "an import started CUDA"
print("loaded", len(layers))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == f"loaded {len(LAYERS) - 1}\n", done.stderr
