"""Tokenizers and chat templates made to break what reads them: one clear line, in bounded time and memory."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megakernel import template_process
from megakernel.chat_template import ChatTemplate
from megakernel.panics import explained
from megakernel.text import ModelText, terminal_safe
from models.errors import UserError
from tests.support.cli_fakes import BUNDLED

ROOT = Path(__file__).resolve().parents[2]
MESSAGES = [{"role": "user", "content": "hello"}]
BPE = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": []}


def tokenizer_of(directory: Path, model: dict[str, Any], **parts: Any) -> ModelText:
    """A tokenizer.json of one model, with nothing around it but `parts`."""
    names = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    content = {"version": "1.0", "added_tokens": [], **dict.fromkeys(names), "model": model, **parts}
    (directory / "tokenizer.json").write_text(json.dumps(content))
    return ModelText(directory)


WITHOUT_UNKNOWN: dict[str, dict[str, Any]] = {
    "WordLevel": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"},
    "WordPiece": {
        "type": "WordPiece",
        "vocab": {"a": 0},
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
    },
    "Unigram": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": None},
    "BPE": {**BPE, "unk_token": "[UNK]"},
}


@pytest.mark.parametrize("model", WITHOUT_UNKNOWN)
def test_a_word_that_the_tokenizer_has_no_token_for(model: str, tmp_path: Path) -> None:
    codec = tokenizer_of(tmp_path, WITHOUT_UNKNOWN[model])
    assert codec.encode("a") == [0]
    with pytest.raises(UserError, match="tokenizer.json cannot take this prompt") as caught:
        codec.encode("zebra")
    assert str(caught.value).isprintable()


def panic_in_loading(directory: Path) -> None:
    # spelled so that our own look at the merges passes over it
    prefix = r'"continuing_subword\u005fprefix": "######"'
    content = json.dumps({"version": "1.0", "added_tokens": [], "model": {**BPE, "merges": [["a", "b"]]}})
    (directory / "tokenizer.json").write_text(content[:-2] + ", " + prefix + "}}")
    ModelText(directory)


def panic_in_encoding(directory: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    tokenizer_of(directory, BPE, pre_tokenizer=split).encode("a" * 60 + "!")


def panic_in_decoding(directory: Path) -> None:
    decoder = {"type": "Strip", "content": "a", "start": 5, "stop": 5}
    tokenizer_of(directory, BPE, decoder=decoder).detokenizer([0]).step(0)


@pytest.mark.parametrize("ask", [panic_in_loading, panic_in_encoding, panic_in_decoding])
def test_a_panic_is_one_line_and_its_report_is_kept_back(
    ask: Callable[[Path], None], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="tokenizer") as caught:
        ask(tmp_path)
    assert re.search("range|retry-limit|index", str(caught.value)), "the library's reason"
    assert type(caught.value.__cause__).__name__ == "PanicException", "which no `except Exception` catches"
    os.write(2, b"and stderr is back\n")
    assert capfd.readouterr().err == "and stderr is back\n"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_ends_a_program_passes(error: type[BaseException]) -> None:
    with pytest.raises(error), explained("tokenizer"):
        raise error


def test_what_others_write_meanwhile_is_not_lost(capfd: pytest.CaptureFixture[str]) -> None:
    with explained("tokenizer"):
        os.write(2, b"a warning\n")
        assert capfd.readouterr().err == ""
    assert capfd.readouterr().err == "a warning\n"
    with pytest.raises(UserError), explained("tokenizer"):
        os.write(2, b"a longer warning, of a failure\n")
        raise ValueError
    with explained("tokenizer"):
        os.write(2, b"short\n")
    assert capfd.readouterr().err == "a longer warning, of a failure\nshort\n"


def test_stderr_may_be_closed() -> None:
    code = f"import os; os.close(2)\nfrom megakernel.text import *\nprint(ModelText(Path({str(BUNDLED)!r})).encode('a'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith(b"[0, ")


def test_a_tokenizer_larger_than_any_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").touch()
    os.truncate(tmp_path / "tokenizer.json", 2**40)
    with pytest.raises(UserError, match="tokenizer.json: more than 100000000 bytes"):
        ModelText(tmp_path)


@pytest.mark.parametrize("merge", [["a", "é"], ["a", "b"], "a b"], ids=str)
def test_merges_that_the_library_would_cut_in_the_middle_of_a_character(merge: Any, tmp_path: Path) -> None:
    """It ends the program where what is left is no text."""
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "é": 2}, "merges": [merge], "continuing_subword_prefix": "#"}
    with pytest.raises(UserError, match="tokenizer.json has merges without its continuing_subword_prefix"):
        tokenizer_of(tmp_path, model)


@pytest.mark.parametrize("merge", [["a", "#b"], "a #b"], ids=str)
def test_merges_that_continue_as_the_tokenizer_says(merge: Any, tmp_path: Path) -> None:
    vocabulary = {"a": 0, "#b": 1, "ab": 2}
    codec = tokenizer_of(tmp_path, {"type": "BPE", "vocab": vocabulary, "merges": [merge], "continuing_subword_prefix": "#"})
    assert codec.encode("ab") == [2]


def replacements(pattern: dict[str, str], content: str, count: int) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": pattern, "content": content} for _ in range(count)]
    return {"normalizers": steps, "decoders": steps, "type": "Sequence"}


@pytest.mark.parametrize("part", ["normalizer", "decoder"])
@pytest.mark.parametrize(
    ("pattern", "content", "count"),
    [({"String": "a"}, "aa", 30), ({"String": "ab"}, "x" * 1000, 1), ({"Regex": "b*"}, "b", 12), ({"String": ""}, "ab", 8)],
    ids=["doubling", "long", "between characters", "nothing"],
)
def test_replacements_that_fill_the_memory(
    part: str, pattern: dict[str, str], content: str, count: int, tmp_path: Path
) -> None:
    """Where memory ends, the library ends the program: there is nothing to catch."""
    with pytest.raises(UserError, match="^[^ ]*tokenizer.json may replace a text by one .* times as long"):
        tokenizer_of(tmp_path, BPE, **{part: replacements(pattern, content, count)})


def test_replacements_as_tokenizers_have_them(tmp_path: Path) -> None:
    blanks = replacements({"String": " "}, "\N{LOWER ONE EIGHTH BLOCK}", 40)
    runs = replacements({"Regex": " {2,}"}, " ", 3)
    assert tokenizer_of(tmp_path, BPE, normalizer=blanks, decoder=blanks).encode("ab") == [0, 1]
    assert tokenizer_of(tmp_path, BPE, normalizer=runs, decoder=runs).encode("ab") == [0, 1]


NO_FILES: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "directory": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"])
def test_what_is_no_file_is_not_opened(file: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "a"}')
    (tmp_path / "tokenizer.json").symlink_to(BUNDLED / "tokenizer.json")
    (tmp_path / file).unlink(missing_ok=True)
    NO_FILES[kind](tmp_path / file)
    with pytest.raises(UserError, match=f"{file}: cannot be read: it is a {kind}"):
        ModelText(tmp_path).encode_chat("a")


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    "content",
    [
        '{"a": ' + "[" * 200 + "]" * 200 + "}",
        "[" * 100_000,
        '{"a": ' * 100_000,
        '{"a": ' + "9" * 5000 + "}",
        "[]",
        '"\\ud800',
        "\xff",
    ],
    ids=["deep", "deep lists", "deep objects", "long integer", "a list", "cut off", "not UTF-8"],
)
def test_a_tokenizer_configuration_that_cannot_be_read(file: str, content: str, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("a")
    (tmp_path / file).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=f"{file}: ") as caught:
        ChatTemplate.of(tmp_path)
    assert str(caught.value).isprintable()


def template_of(directory: Path, template: Any, **config: Any) -> ChatTemplate:
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, **config}))
    return ChatTemplate.of(directory)


@pytest.mark.parametrize(
    "several",
    [[{"name": ["default"], "template": "a"}], [{"name": {}, "template": "a"}], [["default"]], [None], [{}], {"default": "a"}],
    ids=str,
)
def test_names_of_templates_that_are_none(several: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no chat template"):
        template_of(tmp_path, several)


def test_a_default_template_among_names_that_are_none(tmp_path: Path) -> None:
    several = [{"name": ["default"], "template": "wrong"}, {"name": "default", "template": "right"}]
    assert template_of(tmp_path, several).render(MESSAGES) == "right"


@pytest.mark.parametrize("template", ["\ud800", "{{ '\\ud800' }}", "{{ bos_token }}"])
def test_half_a_surrogate_is_no_text(template: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="chat template in .* failed: ") as caught:
        template_of(tmp_path, template, bos_token="\udfff").render(MESSAGES)
    assert str(caught.value).isprintable()


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("template", [ENDLESS, "{{ 9 ** (9 ** 9) }}"], ids=["loops", "within one operation"])
def test_a_template_that_does_not_end(template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megakernel.chat_template._SECONDS", 1.0)
    with pytest.raises(UserError, match="failed: it takes more than 1 s"):
        template_of(tmp_path, template).render(MESSAGES)


def test_the_process_of_a_template_ends_by_itself(tmp_path: Path) -> None:
    """Though whoever started it may be gone: by the limit on its time, here of 1 s."""
    code = Path(template_process.__file__).read_text().replace("SECONDS = 5", "SECONDS = 1")
    (tmp_path / "short.py").write_text(code)
    request = {"path": sys.path, "source": ENDLESS, "variables": {}}
    command = [sys.executable, "-I", "-S", str(tmp_path / "short.py")]
    done = subprocess.run(command, input=json.dumps(request).encode(), capture_output=True, timeout=60)
    assert -done.returncode in (signal.SIGXCPU, signal.SIGKILL)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10 ** 10 }}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
        "{{ '%09999999999d' % 1 }}",
        "{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
        "{{ 'a' * 2 ** 26 }}",
        "{% macro deeper() %}{{ deeper() }}{% endmacro %}{{ deeper() }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ [" + "[" * 900 + "]" * 900 + "] }}",
    ],
    ids=["product", "doubling", "padding", "many parts", "too long a text", "recursion", "parentheses", "lists"],
)
def test_a_template_that_takes_all_there_is(template: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="chat template in .* (failed|refuses this prompt): ") as caught:
        template_of(tmp_path, template).render(MESSAGES)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 2500


def test_the_process_stays_and_a_spoilt_one_does_not(tmp_path: Path) -> None:
    template = template_of(tmp_path, "{% if messages|length > 1 %}{{ 'a' * 10 ** 10 }}{% endif %}{{ messages[0]['content'] }}")
    say = lambda words: [{"role": "user", "content": words}]  # noqa: E731
    assert [template.render(say(words)) for words in ("a", "日本\n", "b" * 10**6)] == ["a", "日本\n", "b" * 10**6]
    before = template._process
    with pytest.raises(UserError, match="failed"):
        template.render(say("a") * 2)
    assert template.render(say("c")) == "c" and template._process is not before
    assert template._process is not None and before is not None and before.poll() is not None
    template._process.kill()
    template._process.wait()
    assert template.render(say("d")) == "d", "one that somebody ended is started again"


def test_the_memory_of_a_template_is_bounded(tmp_path: Path) -> None:
    """What fits is rendered, what does not is refused: neither by the mercy of the machine."""
    length = "{{ ('a' * %d) | length }}"
    assert template_of(tmp_path, length % (template_process.MEMORY_BYTES // 4)).render(MESSAGES).isdigit()
    with pytest.raises(UserError, match="it takes more than 512 MB"):
        template_of(tmp_path, length % template_process.MEMORY_BYTES).render(MESSAGES)


def test_a_template_cannot_reach_the_limits_or_the_terminal(tmp_path: Path) -> None:
    refusal = "{{ raise_exception('\x1b[2Jgone\x07\n\x9b31m') }}"
    with pytest.raises(UserError, match="refuses this prompt") as caught:
        template_of(tmp_path, refusal).render(MESSAGES)
    assert str(caught.value).isprintable()


def test_an_interrupt_ends_the_template_too(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": ENDLESS}))
    code = (
        "import sys\nfrom pathlib import Path\nfrom megakernel.chat_template import ChatTemplate\n"
        f"template = ChatTemplate.of(Path({str(tmp_path)!r}))\nprint('begun', flush=True)\n"
        "try:\n    template.render([])\nexcept KeyboardInterrupt:\n    sys.exit(130)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"begun\n"
        while not (children := children_of(process.pid)):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=5) == 130
    late = time.monotonic() + 5
    while any(Path(f"/proc/{child}/exe").exists() for child in children):  # killed, which takes its moment
        assert time.monotonic() < late


def children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@given(st.text())
def test_terminal_safe_drops_what_a_terminal_obeys(text: str) -> None:
    kept = [letter for letter in text if letter in "\n\t" or not (ord(letter) < 32 or 127 <= ord(letter) < 160)]
    assert terminal_safe(text) == "".join(kept)


def test_terminal_safe_by_hand() -> None:
    assert terminal_safe("a\x1b[31mb\x9b2J\r\n\tc\x7f\x00é日\x07") == "a[31mb2J\n\tcé日"
