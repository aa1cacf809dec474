"""The tail of a prompt on the GPU: from the hidden state, the same bits as the whole token, by the same kernel."""

from __future__ import annotations

import pytest
import torch

from bench.rig import Rig, device_sms
from instructions.base import GREEDY, SamplingState
from megakernel.gpu.machine import GpuProgram
from models.packed import pack
from tests.support.gpu_models import config_of, random_tokens, weights_of
from tests.support.preparation import CASES, Preparation, programs_of

pytestmark = pytest.mark.gpu
NAMES = ["bundled", "head128", "gqa8", "all_biases_linear_head24", "head40_llama3_mha", "sixteen_queries"]
DRAWN = SamplingState(1.5, 20, 0.9, 7)


def hidden_of(program: GpuProgram) -> torch.Tensor:
    """The residual stream that entered the last layer in the last token, fp32 [hidden]."""
    x = program.program.shape.buffers["x"]
    first = x.base + (x.layers - 2) * x.stride + ((program.epoch - 1) & 1) * x.second
    return program.activations[first : first + x.rows].view(torch.float32)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("name", NAMES)
def test_the_bits_are_those_of_the_whole_token(name: str, sampling: SamplingState, preparation: Preparation) -> None:
    case = CASES[name]
    preparation.compiled[name].result()
    rig = Rig(pack(weights_of(name), config_of(name), torch.bfloat16, case.capacity), programs_of(case, device_sms()))
    prompt, edge = random_tokens(name, case.positions), rig.programs.sizes[0]
    tails: dict[int, GpuProgram] = {}
    for position in [0, 1, edge, edge + 1, case.positions - 2, case.positions - 1]:
        if position >= case.positions:
            continue
        rig.start(prompt[: position + 1], sampling)
        wanted = rig.decode(0, position + 1)[-1:]
        rows = rig.cache_rows(position + 1)
        whole, place = rig.program(position), rig.programs.place(position)
        rig.state.hidden.copy_(hidden_of(whole))
        rig.state.tokens[position + 1] = -1
        if place not in tails:
            tails[place] = GpuProgram(rig.programs.program(place, tail=True), rig.state)
        assert tails[place].launch(position, 1).land() == wanted
        assert torch.equal(tails[place].logits(), whole.logits())
        assert torch.equal(rig.cache_rows(position + 1), rows)
