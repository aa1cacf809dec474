"""The list of instructions.  Only lowering and the kernel's dispatch have one, too; CONTRIBUTING.md says what adding takes."""

from __future__ import annotations

from instructions.attention import Attention
from instructions.base import Instruction
from instructions.choose import Choose
from instructions.combine import Combine
from instructions.down import Down
from instructions.embed import Embed
from instructions.expert_down import ExpertDown
from instructions.expert_gate_up import ExpertGateUp
from instructions.gate_up import GateUp
from instructions.hand_over import HandOver
from instructions.lm_head import LmHead
from instructions.o_proj import OProj
from instructions.qkv import Qkv
from instructions.router import Router
from instructions.sample import Sample

INSTRUCTIONS: tuple[type[Instruction], ...] = (
    Embed,
    Qkv,
    Attention,
    Combine,
    OProj,
    GateUp,
    Down,
    LmHead,
    Sample,
    HandOver,
    Router,
    Choose,
    ExpertGateUp,
    ExpertDown,
)
BY_OPCODE: dict[int, type[Instruction]] = {kind.OPCODE: kind for kind in INSTRUCTIONS}
