"""Which tests share a process where tests are dealt out to several: tests/conftest.py, tried with a pytest of its own."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support import ROOT

SOME_TESTS = "import pytest\n@pytest.mark.parametrize('n', range(8))\ndef test_it(n): pass\n"


def processes(folder: Path, *files: str) -> dict[str, set[str]]:
    """The processes that ran the tests of each file."""
    (folder / "tests").mkdir()
    (folder / "pytest.ini").write_text("[pytest]\ntestpaths = tests\nmarkers = gpu\n")
    shutil.copy(ROOT / "tests" / "conftest.py", folder / "tests")
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(SOME_TESTS)
    command = [sys.executable, "-m", "pytest", "-v", "-n", "2", "--dist", "loadgroup", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    ran = re.findall(r"^\[(gw\d)\].* PASSED (\S+?)::", done.stdout, flags=re.MULTILINE)
    return {file: {worker for worker, name in ran if name == file} for file in files}


def test_gpu_tests_share_one_process_and_others_do_not(tmp_path: Path) -> None:
    found = processes(tmp_path, "tests/gpu/test_one.py", "tests/gpu/test_two.py", "tests/test_other.py", "tests/test_more.py")
    assert found["tests/gpu/test_one.py"] == found["tests/gpu/test_two.py"]
    assert len(found["tests/gpu/test_one.py"]) == 1
    assert len(set.union(*found.values())) == 2, "no test is dealt out at all"
