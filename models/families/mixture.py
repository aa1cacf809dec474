"""What the families with mixtures of experts share: in place of one MLP a router and many of them (arXiv:1701.06538), of which
each token takes a few."""

from __future__ import annotations

from typing import Any

from models.families.base import Linear, Module, Norm

SIZES = {"num_experts": ("num_experts", "num_local_experts"), "experts_per_token": ("num_experts_per_tok",)}
GATE_UP, DOWN = "experts.gate_up_proj", "experts.down_proj"  # all experts in one tensor, as transformers 5 has them


def mixture(
    router: Module,
    modules: tuple[str, str, str],
    stacked: tuple[tuple[str, ...], tuple[str, ...]],
    published_stacked: bool = False,
) -> tuple[Linear, ...]:
    """The linears of a mixture after attention's; `modules` are an expert's gate, up and down, `stacked` the tensors that may
    hold all experts' gates and ups, and those for their downs."""
    gate, up, down = modules
    norm = Norm("mlp", "post_attention_layernorm")
    hidden: dict[str, Any] = {"source": "hidden", "columns": "hidden_size", "bias": "", "norm": norm}
    of_experts: dict[str, Any] = {"experts": True, "published_stacked": published_stacked}
    return (
        Linear("router", (router,), row_order="experts", **hidden),
        Linear(
            "expert_gate_up",
            (Module(gate, "intermediate_size"), Module(up, "intermediate_size")),
            row_order="gate_up",
            stacked=stacked[0],
            **hidden,
            **of_experts,
        ),
        Linear(
            "expert_down",
            (Module(down, "hidden_size"),),
            source="mlp",
            columns="intermediate_size",
            row_order="hidden",
            bias="",
            stacked=stacked[1],
            **of_experts,
        ),
    )
