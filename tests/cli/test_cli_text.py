"""Streaming detokenisation and chat templates: no piece is ever taken back, and together they are the whole text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megakernel.chat_template import ChatTemplate
from megakernel.text import REPLACEMENT, IdsAsText, ModelText, WindowDetokenizer
from models.errors import UserError
from tests.support import BUNDLED
from tests.support.cli_fakes import bundled_tokenizer, ids_of


def stream(decode: Callable[[list[int]], str], prompt: list[int], ids: list[int]) -> list[str]:
    """The piece of each id, then what `finish` gives."""
    detokenizer = WindowDetokenizer(decode, prompt)
    return [*(detokenizer.step(token) for token in ids), detokenizer.finish()]


def byte_decode(ids: list[int]) -> str:
    """Each id a byte: the hardest case for a byte-level tokenizer, every character cut at every byte."""
    return bytes(ids).decode("utf-8", "replace")


def fallback_decode(ids: list[int]) -> str:
    """Byte fallback as `tokenizers` does it: a run of bytes (ids < 256) is decoded as a whole, or lost as a whole."""
    text, run = "", b""
    for token in [*ids, 256]:
        if token < 256:
            run += bytes([token])
            continue
        try:
            text += run.decode()
        except UnicodeDecodeError:
            text += REPLACEMENT * len(run)
        run = b""
        text += chr(token) if token > 256 else ""
    return text


def word_decode(ids: list[int]) -> str:
    """As SentencePiece does it: a blank in front of every word, dropped where the sequence starts."""
    return "".join(f" word{token}" for token in ids).removeprefix(" ")


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30), st.text(max_size=10))
@example("😀👩‍👩‍👧 naïve 日本", "é")
@example("ends with \N{REPLACEMENT CHARACTER}", "")
@pytest.mark.parametrize("decode", [byte_decode, fallback_decode])
def test_valid_text_streams_without_a_replaced_character(decode: Callable[[list[int]], str], text: str, prompt: str) -> None:
    pieces = stream(decode, list(prompt.encode()), list(text.encode()))
    assert "".join(pieces) == text
    assert all(piece.count(REPLACEMENT) <= text.count(REPLACEMENT) for piece in pieces)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=60))
def test_any_bytes_stream_to_what_decoding_them_whole_gives(ids: list[int]) -> None:
    assert "".join(stream(byte_decode, [], ids)) == byte_decode(ids)


def test_each_character_comes_with_its_last_byte() -> None:
    pieces = stream(byte_decode, [], list("aé日😀".encode()))
    assert pieces == ["a", "", "é", "", "", "日", "", "", "", "😀", ""]


def test_byte_fallback_keeps_a_printed_character_when_the_next_one_begins() -> None:
    # With the first byte of the second character the whole run reads as lost, the first character included.
    assert stream(fallback_decode, [], list("日本".encode())) == ["", "", "日", "", "", "本", ""]


def test_an_unfinished_character_is_replaced_only_at_the_end() -> None:
    pieces = stream(byte_decode, [], list("a😀".encode())[:-1])
    assert pieces == ["a", "", "", "", REPLACEMENT]


def test_bytes_that_are_no_text_do_not_dam_up_what_follows() -> None:
    pieces = stream(byte_decode, [], [0xFF] * 20 + [ord("a")])
    assert "".join(pieces) == REPLACEMENT * 20 + "a"
    assert any(pieces[:15])


def test_a_first_word_keeps_the_blank_that_sets_it_off_from_the_prompt() -> None:
    assert stream(word_decode, [1, 2], [3, 4]) == [" word3", " word4", ""]
    assert stream(word_decode, [], [3, 4]) == ["word3", " word4", ""]


@given(st.text(max_size=40), st.integers(1, 9))
def test_tokens_that_come_together_are_the_same_text(text: str, count: int) -> None:
    ids, codec = ids_of(text), ModelText(BUNDLED)
    together, one_by_one = codec.detokenizer([0]), codec.detokenizer([0])
    shown = [together.steps(ids[start : start + count]) for start in range(0, len(ids), count)]
    assert "".join([*shown, together.finish()]) == "".join([*map(one_by_one.step, ids), one_by_one.finish()])


def test_a_stream_decodes_windows_not_all_that_came_before() -> None:
    longest = 0

    def decode(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return word_decode(ids)

    stream(decode, list(range(500)), list(range(500)))
    assert longest <= 10


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40), st.text(min_size=1, max_size=20))
def test_the_bundled_tokenizer_streams_any_text(text: str, prompt: str) -> None:
    codec = ModelText(BUNDLED)
    detokenizer = codec.detokenizer(codec.encode(prompt))
    ids = ids_of(text)
    pieces = [*(detokenizer.step(token) for token in ids), detokenizer.finish()]
    assert "".join(pieces) == bundled_tokenizer().decode(ids, skip_special_tokens=True)


def test_special_tokens_are_not_text() -> None:
    detokenizer = ModelText(BUNDLED).detokenizer([0])
    assert [detokenizer.step(token) for token in [*ids_of("a"), 1, 2]] == ["a", "", ""]


def test_random_weights_take_bytes_and_show_ids() -> None:
    codec = IdsAsText()
    assert codec.encode("aé") == [97, 0xC3, 0xA9]
    detokenizer = codec.detokenizer([97])
    assert [detokenizer.step(5), detokenizer.step(17), detokenizer.finish()] == ["5", " 17", ""]
    with pytest.raises(UserError, match="no chat template"):
        codec.encode_chat("a")


def test_the_post_processor_begins_a_prompt_and_the_template_a_chat() -> None:
    codec = ModelText(BUNDLED)
    assert codec.encode("a") == [0, *ids_of("a")]
    assert codec.encode_chat("a") == [0, 3, *ids_of("a"), 1, 4]  # <|begin|><|user|>a<|end|><|assistant|>


def test_bundled_chat_is_what_transformers_makes_of_it() -> None:
    from transformers import AutoTokenizer

    chat = [{"role": "user", "content": "What is\n a list?"}]
    expected: Any = AutoTokenizer.from_pretrained(BUNDLED).apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True
    )
    assert ModelText(BUNDLED).encode_chat("What is\n a list?") == list(expected["input_ids"])


def template_of(tmp_path: Path, template: Any, **config: Any) -> ChatTemplate:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, **config}))
    return ChatTemplate.of(tmp_path)


MESSAGES = [{"role": "user", "content": "Zoë <b>"}]


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m.content }}\n{% endfor %}",
        "  {% if add_generation_prompt %}\n yes\n  {% endif %}\n",
        "{{ messages | tojson }}",
        "{{ messages | tojson(indent=2) }}",
        "{{ strftime_now('%Y') }} {{ eos_token }}",
        "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}",
        "{% if tools is not none or documents %}with tools{% else %}bare{% endif %}",
        "{% set ns = namespace(x=1) %}{% for m in messages %}{% set ns.x = ns.x + 1 %}{% endfor %}{{ ns.x }}",
    ],
)
def test_templates_render_as_in_transformers(tmp_path: Path, template: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    special = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}
    ours = template_of(tmp_path, template, **special).render(MESSAGES)
    theirs = render_jinja_template(
        [MESSAGES], chat_template=template, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    assert ours == theirs[0][0]


def test_a_named_default_template_is_taken_among_several(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert template_of(tmp_path, several).render(MESSAGES) == "plain"


def test_a_template_file_comes_before_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("from the file {{ bos_token }}")
    assert template_of(tmp_path, "from the configuration", bos_token="<s>").render(MESSAGES) == "from the file <s>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only system turns') }}", "only system turns"),
        ("{% for %}", "refuses"),
        ("{{ messages[0].content.no.such }}", "refuses"),
        ("{{ ''.__class__.__mro__ }}", "refuses"),  # the way out of a template that is not sandboxed
        ("{{ messages.append(1) }}", "refuses"),  # immutable
        ("{{ 1 + 'a' }}", "failed: TypeError"),
        ("{{ 1 / 0 }}", "failed: ZeroDivisionError"),
        (None, "no chat template"),
        ([{"name": "tool_use", "template": "tools"}], "no chat template"),
    ],
)
def test_a_template_that_cannot_render_is_one_clear_line(tmp_path: Path, template: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        template_of(tmp_path, template).render(MESSAGES)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
