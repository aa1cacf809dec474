"""Granite 3.x, the mixtures of experts: a Granite with a router whose softmax is over the chosen experts
(https://huggingface.co/ibm-granite/granite-3.1-3b-a800m-instruct)."""

from __future__ import annotations

from models.config import ModelConfig
from models.families.base import Family, Layer, Module
from models.families.granite import MULTIPLIERS
from models.families.llama import BIASES, DEFAULTS, LAYER
from models.families.mixture import DOWN, GATE_UP, mixture

_QKV, _OUTPUT, *_ = LAYER.linears
_BLOCK = "block_sparse_moe."
_EXPERT = _BLOCK + "experts.{expert}."
_MIXTURE = mixture(
    Module(f"{_BLOCK}router.layer", "num_experts", (f"{_BLOCK}router",)),
    (f"{_EXPERT}gate_proj", f"{_EXPERT}up_proj", f"{_EXPERT}down_proj"),
    ((f"{_BLOCK}input_linear.weight", _BLOCK + GATE_UP), (f"{_BLOCK}output_linear.weight", _BLOCK + DOWN)),
    published_stacked=True,
)

FAMILY = Family(
    name="granitemoe",
    architecture="GraniteMoeForCausalLM",
    layer=Layer((_QKV, _OUTPUT, *_MIXTURE)),
    defaults={**DEFAULTS, **dict.fromkeys(MULTIPLIERS, 1.0), "num_local_experts": 8, "num_experts_per_tok": 2},
    booleans={"attention_bias": BIASES["attention_bias"]},
    numbers={name: name for name in MULTIPLIERS},
    sizes={"num_experts": ("num_local_experts",), "experts_per_token": ("num_experts_per_tok",)},
    fixed={"renormalised": True},
    presets={
        "granite-3.1-3b-a800m": ModelConfig(
            family="granitemoe",
            hidden_size=1536,
            intermediate_size=512,
            num_layers=32,
            num_heads=24,
            num_kv_heads=8,
            head_dim=64,
            vocab_size=49155,
            rms_eps=1e-6,
            rope_theta=10000000.0,
            tied_embeddings=True,
            embedding_multiplier=12.0,
            attention_multiplier=0.015625,
            residual_multiplier=0.22,
            logits_scaling=6.0,
            num_experts=40,
            experts_per_token=8,
            renormalised=True,
            max_position=131072,
            bos_token_id=0,
            eos_token_ids=(0,),
        ),
    },
)
