"""The text the bundled model learns: what a Python installation says about itself.

Library reference topics, docstrings, prose comments and the licence, as documents in one fixed order.  Knows nothing of tokens
or training beyond the five special tokens that mark where a document and a turn of a conversation begin and end.  Nothing is
imported from the library being read (built-in modules aside): sources are parsed, so that reading has no side effects.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import re
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from zlib import crc32

BEGIN, END, SYSTEM, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (BEGIN, END, SYSTEM, USER, ASSISTANT)
RECORD_SEPARATOR = "\x1e"  # between records of a written corpus; ASCII's own character for this

# Tables in the form of modules, and a second copy of text that is read from elsewhere.
_SKIPPED_PARTS = ("site-packages", "encodings", "pydoc_data", "__pycache__", "_sysconfigdata", "lib-dynload")
_QUESTIONS = ("What does {} do?", "Explain {}.", "What is {}?", "Tell me about {}.", "How do I use {}?")
_SHORTEST_DOCUMENT, _SHORTEST_COMMENT, _LONGEST_ANSWER = 40, 100, 900  # characters


def records() -> Iterator[str]:
    """Every record once, in an order that depends on this Python version alone.

    A record is one document, or a document and the conversation made from it: the two must fall on the same side of the split
    between training and validation.  Each document is `<|begin|>text<|end|>`.
    """
    seen: set[str] = set()
    for title, text in _sources():
        text = clean(text)
        if len(text) < _SHORTEST_DOCUMENT or text in seen:
            continue
        seen.add(text)
        yield _document(f"{title}\n\n{text}" if title else text) + _conversation(title, text)


def is_validation(record: str) -> bool:
    """One record in fifty, chosen by its own bytes: the same ones whatever else is in the corpus."""
    return crc32(record.encode()) % 50 == 0


def clean(text: str) -> str:
    """Dedented text without doctest sessions, rules, control characters or trailing blanks."""
    kept, in_doctest = [], False
    for line in inspect.cleandoc(text.expandtabs()).splitlines():
        line = re.sub(r"[\x00-\x08\x0b-\x1f]", "", line).rstrip()
        in_doctest = line.lstrip().startswith(">>>") or (in_doctest and bool(line))
        if not in_doctest and not re.fullmatch(r"\s*([-=*#~_+.])\1{5,}.*", line):
            kept.append(line)
    joined = re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()
    for token in SPECIAL_TOKENS:
        joined = joined.replace(token, "")
    return joined


def is_prose(text: str) -> bool:
    """Whether a comment reads as sentences, not as code put to rest or a table."""
    words = re.findall(r"[a-z]{2,}", text)
    letters = sum(character.isalpha() or character in " \n,." for character in text)
    return len(words) >= 8 and letters >= 0.88 * len(text)


def _document(text: str) -> str:
    return f"{BEGIN}{text}{END}"


def _conversation(title: str, text: str) -> str:
    """A question about `title` answered by the first paragraphs of `text`; empty where there is no title."""
    name = title.split("(")[0].strip()
    answer = text.split("\n\n")[0]
    if not name or not is_prose(answer) or len(answer) > _LONGEST_ANSWER:
        return ""
    question = _QUESTIONS[crc32(name.encode()) % len(_QUESTIONS)].format(name)
    return f"{BEGIN}{USER}{question}{END}{ASSISTANT}{answer}{END}"


def _sources() -> Iterator[tuple[str, str]]:
    """(title or "", raw text) of everything read."""
    library = Path(sysconfig.get_paths()["stdlib"])
    yield from _topics()
    yield from _plain_files(library)
    yield from _builtin_docstrings()
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library).with_suffix("").as_posix()
        if not any(part in name for part in _SKIPPED_PARTS):
            yield from _module(name.replace("/", ".").removesuffix(".__init__"), path)
    for path in sorted(Path(sysconfig.get_paths()["include"]).rglob("*.h")):
        for comment in re.findall(r"/\*(.*?)\*/", path.read_text("utf-8", "replace"), re.DOTALL):
            text = "\n".join(re.sub(r"^\s*\*+ ?", "", line) for line in comment.splitlines())
            if is_prose(text):
                yield "", text


def _topics() -> Iterator[tuple[str, str]]:
    """The language reference as `help()` shows it."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for _, text in sorted(topics.items()):
        first, _, rest = text.strip().partition("\n\n")
        title, _, rule = first.partition("\n")
        if rule and not rule.strip("*=-"):  # a heading and its underline
            yield title, rest
        else:
            yield "", text


class _Paragraphs(HTMLParser):
    """The text of an HTML page, a blank line between its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _plain_files(library: Path) -> Iterator[tuple[str, str]]:
    for path in sorted([library / "LICENSE.txt", *library.glob("idlelib/*.txt"), *library.glob("idlelib/*.html")]):
        if path.exists():
            text = path.read_text("utf-8", "replace")
            if path.suffix == ".html":
                parser = _Paragraphs()
                parser.feed(text)
                text = "".join(parser.text).replace("¶", "")
            yield "", text


def _builtin_docstrings() -> Iterator[tuple[str, str]]:
    """Documentation of what is written in C: it has no source to parse."""
    names = {*sys.builtin_module_names, "math", "zlib", "array", "_datetime"} - {"builtins"}
    for module_name in ("builtins", *sorted(names)):
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            continue
        prefix = "" if module_name == "builtins" else module_name.lstrip("_") + "."
        for name, value in sorted(vars(module).items()):
            yield from _described(prefix + name, value)
            if inspect.isclass(value):
                for member, method in sorted(vars(value).items()):
                    yield from _described(f"{prefix}{name}.{member}", method)


def _described(name: str, value: object) -> Iterator[tuple[str, str]]:
    if callable(value) and isinstance(getattr(value, "__doc__", None), str):
        signature = getattr(value, "__text_signature__", None) or "()"
        yield name + re.sub(r"\$\w+, (/, )?|\$\w+(, /)?", "", signature), str(value.__doc__)


def _module(name: str, path: Path) -> Iterator[tuple[str, str]]:
    """Docstrings under their signatures, then the comments, of one source file."""
    try:
        source = path.read_text("utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
        comments = list(_comments(source))
    except (UnicodeDecodeError, SyntaxError, ValueError, tokenize.TokenError):
        return  # test data of the library's own parsers
    yield from _docstrings(name, tree)
    for comment in comments:
        if len(comment) >= _SHORTEST_COMMENT:
            yield "", comment


def _docstrings(name: str, node: ast.AST) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        title = f"{name}({ast.unparse(node.args)})"
    else:
        title = name
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text and is_prose(clean(text)):
            yield _title(name, title), text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(f"{name}.{child.name}", child)


def _title(name: str, signature: str) -> str:
    """The heading of a docstring: none for the library's own tests, whose names would be most of what is learnt."""
    if name.startswith("test."):
        return ""
    return signature if len(signature) < 120 else name


def _comments(source: str) -> Iterator[str]:
    """Prose of consecutive comment lines."""
    lines: list[str] = []
    last = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or token.line[: token.start[1]].strip():
            continue
        if token.start[0] != last + 1:
            yield from filter(is_prose, ["\n".join(lines)])
            lines = []
        lines.append(token.string.lstrip("#!:").removeprefix(" "))
        last = token.start[0]
    yield from filter(is_prose, ["\n".join(lines)])


def python_version() -> str:
    """Of the Python whose text `records` gives."""
    return sys.version.split()[0]


def write(path: Path) -> None:
    """The corpus as one file: the Python version it was read from, then the records, a separator between each two."""
    path.write_text(RECORD_SEPARATOR.join([python_version(), *records()]), encoding="utf-8")


def read(path: Path) -> tuple[str, list[str]]:
    """(Python version, records) of a file that `write` made."""
    version, *found = path.read_text(encoding="utf-8").split(RECORD_SEPARATOR)
    return version, found
