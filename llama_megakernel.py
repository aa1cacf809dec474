"""`llama-megakernel COMMAND [options]`: all that the project does, by one name.

    llama-megakernel run --prompt "Why is the sky blue?"
    llama-megakernel serve --port 8000

Without a command, options are those of `run`.  Knows the commands' names and no more: each reads its own options.
"""

from __future__ import annotations

from models.process import begin

if __name__ == "__main__":
    begin()  # before all that takes time to import

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from models import completion
from models.command import Parser, called, command, start
from models.errors import UserError, quoted

NAME = "llama-megakernel"
COMMANDS = {  # module, what it does
    "run": ("run_llama1b", "decode text, the default"),
    "chat": ("chat.command", "talk with a model in the terminal"),
    "serve": ("serving.command", "answer the requests of OpenAI's API, and a page to chat in"),
    "draw": ("scheduler.draw.__main__", "draw a schedule: a page that opens offline, SVG, DOT"),
    "check": ("scheduler.check.__main__", "prove a program from a file"),
}
BENCH = "bench"  # runs from a checkout
EXTRAS = {"serving.command": "serve", "chat.command": "chat"}  # what pyproject.toml calls what they need


def overview() -> str:
    """What is printed for --help: every command in a line."""
    width = len(f"{BENCH} NAME") + 2
    lines = [f"  {name:{width}}{about}" for name, (_, about) in COMMANDS.items()]
    benches = f"  {BENCH + ' NAME':{width}}measure, from a checkout: {', '.join(benchmarks()) or 'there is none here'}"
    return "\n".join(
        [f"usage: {NAME} [COMMAND] [options]", "", *lines, benches, "", f"`{NAME} COMMAND --help` has the options of each."]
    )


def benchmarks() -> dict[str, str]:
    """The modules of `bench` that are commands, by name; none where only the wheel is installed."""
    spec = find_spec(BENCH)
    found = {}
    for folder in map(Path, (spec and spec.submodule_search_locations) or ()):
        for path in sorted(folder.glob("*/__main__.py")):
            found[path.parent.name] = f"{BENCH}.{path.parent.name}.__main__"
        for path in sorted(folder.glob("*.py")):
            if "\n@command\n" in path.read_text(encoding="utf-8"):
                found[path.stem] = f"{BENCH}.{path.stem}"
    return dict(sorted(found.items()))


def benchmark(arguments: list[str]) -> tuple[str, str, list[str]]:
    """What `bench NAME ...` stands for; raises UserError where there is no such measurement."""
    known = benchmarks()
    if not known:
        raise UserError("bench runs from a checkout of the project, which this is not")
    if not arguments or arguments[0] not in known:
        said = quoted(arguments[0]) if arguments else "nothing"
        raise UserError(f"bench {said}: name one of {', '.join(known)}")
    return f"{BENCH} {arguments[0]}", known[arguments[0]], arguments[1:]


def chosen(arguments: list[str]) -> tuple[str, str, list[str]]:
    """(name, module, its arguments) of a command line; options alone are those of `run`."""
    if not arguments or arguments[0].startswith("-"):
        return "run", COMMANDS["run"][0], arguments
    name, *rest = arguments
    if name == BENCH:
        return benchmark(rest)
    if name not in COMMANDS:
        raise UserError(f"{name}: no command of this name, choose one of {', '.join((*COMMANDS, BENCH))} (see --help)")
    return name, COMMANDS[name][0], rest


def named() -> list[str]:
    """The words on the line that a shell wants completed, where they name a command; else the shell is told the names."""
    words, begun = completion.line()
    names = {(): (*COMMANDS, BENCH), (BENCH,): tuple(benchmarks())}.get(tuple(words))
    if names is not None and not begun.startswith("-"):
        completion.skip(len(words))
        parser = Parser(NAME, overview())
        parser.add_argument("command", choices=names)
        completion.answer(parser)
    completion.skip(len(words) - len(chosen(words)[2]))
    return words


@command
def main(arguments: list[str] | None = None) -> int:
    """The exit status of the command that is named."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if completion.asked():
        arguments = named()
    if arguments in (["--help"], ["-h"]):
        print(overview())
        return 0
    name, module, rest = chosen(arguments)
    called(f"{NAME} {name}")
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        if module not in EXTRAS or error.name is None or error.name.split(".")[0] == module.split(".")[0]:
            raise
        raise UserError(f"{name} needs {error.name}: pip install 'llama-megakernel[{EXTRAS[module]}]'") from None
    status: int = found.main(rest)
    return status


def process() -> NoReturn:
    """One command as this process."""
    start(main)


if __name__ == "__main__":
    process()
