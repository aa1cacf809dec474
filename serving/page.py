"""The page at `/`: markup, style and script joined into one file that asks nothing of any network but this server."""

from __future__ import annotations

from importlib.resources import files

SCRIPTS = ("store.js", "stream.js", "view.js", "main.js")


def asset(name: str) -> str:
    """The text of a file in `assets/`."""
    return (files("serving") / "assets" / name).read_text(encoding="utf-8")


def page() -> str:
    """The file's text."""
    script = "\n".join(asset(name) for name in SCRIPTS)
    return asset("page.html").replace("{{style}}", asset("page.css")).replace("{{script}}", script)
