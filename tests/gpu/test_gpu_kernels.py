"""What runs on the GPU while a text is generated, prompt and answer: kernels of this project alone, by PyTorch's profiler."""

from __future__ import annotations

import pytest

from bench.compare.adapter import LoadSpec
from bench.compare.adapters.ours import Megakernel
from bench.compare.kernels import MEMORY, OWN, watched
from tests.support import BUNDLED

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("options", [{}, {"weights": "fp8"}], ids=["bf16", "fp8"])
def test_every_kernel_of_a_generation_is_our_own(options: dict[str, str]) -> None:
    adapter = Megakernel(**options)
    adapter.load(LoadSpec(str(BUNDLED), 512, 1024))
    prompt = [3 + place % 50 for place in range(200)]

    def generate() -> None:
        assert sum(len(piece) for piece in adapter.generate(prompt, 40, False)) == 40

    try:
        generate()  # makes what is made once
        found = watched(generate, adapter.kernel_names)
    finally:
        adapter.close()
    print(*found, sep="\n")
    assert {kernel["kind"] for kernel in found} <= {OWN, MEMORY}
    names = [kernel["name"] for kernel in found if kernel["kind"] == OWN]
    assert "megakernel" in names and len(names) > 1, "decode, and prefill's"
