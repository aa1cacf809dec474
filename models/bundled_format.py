"""The files of the bundled model, in the spellings that transformers 4 and 5 both read: architecture, tokenizer, chat template,
weights and card.  Knows nothing of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from models import bundled_corpus as corpus

VOCABULARY = 2048
ARCHITECTURE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# A turn is its role's token, its text, and the token that ends documents too: generation stops where the turn does.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('Unknown role ' + message['role'] + ': use system, user or assistant') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(records: list[str]) -> Any:
    """Byte-level BPE over all 256 bytes, so that any text survives a round trip; begins every text with `<|begin|>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(corpus.SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.add_special_tokens(list(corpus.SPECIAL_TOKENS))  # so that the corpus is cut at them, not through them
    tokenizer.train_from_iterator(records, trainer)
    begin = tokenizer.token_to_id(corpus.BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{corpus.BEGIN} $A", pair=f"{corpus.BEGIN} $A $B", special_tokens=[(corpus.BEGIN, begin)]
    )
    return tokenizer


def save_formats(out: Path, tokenizer: Any) -> None:
    """Everything but the weights and the card, in the files and spellings that transformers 4 and 5 both read."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    special = {"bos_token": corpus.BEGIN, "eos_token": corpus.END}
    ends = {"bos_token_id": ARCHITECTURE["bos_token_id"], "eos_token_id": ARCHITECTURE["eos_token_id"]}
    files = {
        "config.json": ARCHITECTURE | {"torch_dtype": "bfloat16"},
        "generation_config.json": ends | {"do_sample": False},
        "tokenizer_config.json": special
        | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": ARCHITECTURE["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_weights(out: Path, model: Any) -> None:
    """bf16, without the head, which is the embedding."""
    from safetensors.torch import save

    tensors = {name: value.detach().to("cpu", torch.bfloat16) for name, value in model.state_dict().items()}
    tensors.pop("lm_head.weight", None)
    # save_file would make a file that only its owner may read.
    (out / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))


CARD = """\
---
license: psf-2.0
language: en
---
# The bundled model

A Llama of {parameters:,} parameters, small enough to live in a source repository.  It is what `run_llama1b.py` runs when no
model is named, and what the tests decode.  It writes English in the manner of Python's documentation.  It knows nothing:
do not rely on a word it says.

- Made by `models/train_bundled.py`; the same arguments on the same machine repeat it.
- Text: reference topics, docstrings, prose comments and the licence of CPython {python}, {characters:,} characters,
  SHA-256 `{digest}`.  Copyright Python Software Foundation, under the PSF License Agreement
  (https://docs.python.org/3/license.html); the weights are offered under the same terms.
- Tokenizer: byte-level BPE of {vocabulary} tokens, trained on that text.
- Training: {recipe}
- Kept: step {step} of that run, after {seconds:.0f} s on {device} (torch {torch}).  Loss on the 2 % of documents held out:
  {loss:.3f} nats a token.
"""
