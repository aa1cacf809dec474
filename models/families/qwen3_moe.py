"""Qwen3, the mixtures of experts: its attention, and experts whose weights may be renormalised (arXiv:2505.09388).

Every layer is a mixture; a model with some dense ones is refused.
"""

from __future__ import annotations

from models.config import ModelConfig
from models.families.base import Family, Layer, Module
from models.families.llama import BIASES
from models.families.mixture import DOWN, GATE_UP, SIZES, mixture
from models.families.qwen2 import DEFAULTS
from models.families.qwen3 import FAMILY as QWEN3

_QKV, _OUTPUT, *_ = QWEN3.layer.linears
EXPERT = "mlp.experts.{expert}."
MIXTURE = mixture(
    Module("mlp.gate", "num_experts"),
    (f"{EXPERT}gate_proj", f"{EXPERT}up_proj", f"{EXPERT}down_proj"),
    ((f"mlp.{GATE_UP}",), (f"mlp.{DOWN}",)),
)

FAMILY = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    layer=Layer((_QKV, _OUTPUT, *MIXTURE)),
    defaults={
        **DEFAULTS,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 768,
        "num_local_experts": 128,
        "num_experts_per_tok": 8,
    },
    booleans={"attention_bias": BIASES["attention_bias"], "norm_topk_prob": ("renormalised",)},
    sizes={**SIZES, "intermediate_size": ("moe_intermediate_size",)},
    window_switch="use_sliding_window",
    presets={
        "qwen3-30b-a3b": ModelConfig(  # https://huggingface.co/Qwen/Qwen3-30B-A3B
            family="qwen3_moe",
            hidden_size=2048,
            intermediate_size=768,
            num_layers=48,
            num_heads=32,
            num_kv_heads=4,
            head_dim=128,
            vocab_size=151936,
            rms_eps=1e-6,
            rope_theta=1000000.0,
            num_experts=128,
            experts_per_token=8,
            renormalised=True,
            max_position=40960,
            bos_token_id=151643,
            eos_token_ids=(151645,),
        ),
    },
)
