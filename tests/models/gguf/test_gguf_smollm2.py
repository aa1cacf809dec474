"""A trained model through the whole reading path, where it is in the cache: tokens, bits, and what it answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megakernel.text import codec_of
from models.checkpoint import Checkpoint, open_checkpoint
from models.packed import pack
from models.packing import unpack
from models.smollm2 import cached
from models.weights import Weights
from tests.models.gguf.test_gguf_tokenizer import TEXTS, theirs
from tests.support.hf_model import hf_model

pytestmark = [pytest.mark.smollm2, pytest.mark.slow]
QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."


@pytest.fixture(scope="module")
def path() -> Path:
    found = cached()
    assert found is not None
    return found


@pytest.fixture(scope="module")
def checkpoint(path: Path) -> Checkpoint:
    return open_checkpoint(path)


def test_the_tokenizer_is_transformers(path: Path, checkpoint: Checkpoint) -> None:
    our, their = codec_of(checkpoint), theirs(path)
    for text in TEXTS:
        assert our.encode(text) == their(text).input_ids, text
    turn = [{"role": "user", "content": QUESTION}]
    expected = their.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert our.encode_chat(QUESTION) == list(expected)


def test_the_tape_holds_the_bits_of_transformers(path: Path, checkpoint: Checkpoint) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", num_hidden_layers=checkpoint.config.num_layers))
    their = load_gguf_checkpoint(path, return_tensors=True, model_to_load=shell, torch_dtype=torch.bfloat16)["tensors"]
    packed = pack(checkpoint.source, checkpoint.config, capacity=64)
    ours = unpack(packed.tape, packed.weights, packed.constants)
    assert len(ours) == 272 and ours.keys() <= their.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor.to(torch.bfloat16), torch.as_tensor(their[name]).to(torch.bfloat16)), name


def test_the_answer(checkpoint: Checkpoint) -> None:
    """Greedy, by transformers in fp32 with the weights that we read."""
    codec = codec_of(checkpoint)
    prompt = codec.encode_chat(QUESTION)
    weights = Weights.collect(checkpoint.source, torch.float32)
    model = hf_model(checkpoint.config, weights.by_name, torch.float32, "cpu")
    ends = list(checkpoint.config.eos_token_ids)
    with torch.no_grad():
        found = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=ends, pad_token_id=2)
    decode = codec.detokenizer(prompt)
    assert "".join([*map(decode.step, found[0, len(prompt) :].tolist()), decode.finish()]) == ANSWER
