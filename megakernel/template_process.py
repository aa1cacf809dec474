"""A process of its own that renders one chat template: a template is a program, out of a file that may come from
anybody, and only a process can be kept from taking all time and memory.

Run by `megakernel.chat_template.ChatTemplate` as a file, with an interpreter that looks nowhere for modules: reads JSON objects
from stdin, one a line, and for each writes one to stdout, with `text`, or `refused` or `failed` and the reason. Knows nothing
of models, and imports nothing of this project.
"""

from __future__ import annotations

import functools
import json
import resource
import sys
import time
from typing import Any

SECONDS = 5  # of computing; a template takes some milliseconds
MEMORY_BYTES = 2**29  # a template takes some megabytes beside the 25 of Python and Jinja
TEXT_CHARACTERS = 2**24  # far more than any context holds


def limit_itself() -> None:
    """Less, where whoever started this has less."""
    for kind, most in ((resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def limit_time() -> None:
    """From now on, so many seconds more; the process ends where they are over."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    most = int(time.process_time()) + SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def render(source: str, variables: dict[str, Any]) -> dict[str, str]:
    """`text`, or why there is none."""
    from jinja2 import TemplateError

    try:
        text = str(parsed(source).render(**variables))
    except TemplateError as error:
        return {"refused": str(error.message)}
    except MemoryError:
        return {"failed": f"it takes more than {MEMORY_BYTES >> 20} MB"}
    except Exception as error:  # a template can fail in any way Python can
        return {"failed": f"{type(error).__name__}: {error}"}
    if len(text) > TEXT_CHARACTERS:
        return {"failed": f"it writes {len(text)} characters"}
    return {"text": text}


@functools.lru_cache(1)
def parsed(source: str) -> Any:
    """The template, which is the same from one conversation to the next."""
    return sandbox().from_string(source)


def sandbox() -> Any:
    """The environment that transformers gives chat templates, without its training-time extensions."""
    from datetime import datetime

    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)  # Jinja's own escapes for HTML

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment


def main() -> None:
    limit_itself()
    for line in sys.stdin:
        limit_time()
        request = json.loads(line)
        sys.path[:] = request["path"]
        print(json.dumps(render(request["source"], request["variables"])), flush=True)


if __name__ == "__main__":
    main()
