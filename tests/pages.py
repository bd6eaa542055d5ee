"""The Markdown files of the repository, parsed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted(
    page for folder in (".", "benchmarks", "docs") for page in (ROOT / folder).glob("*.md")
)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def tokens(page: Path) -> tuple[Token, ...]:
    """Blocks, and within them what stands in a line."""

    def walk(found: list[Token]) -> Iterator[Token]:
        for token in found:
            yield token
            yield from walk(token.children or [])

    return tuple(walk(MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8"))))


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a language, in order."""
    return [token.content for token in fences(page) if token.info == language]


def fences(page: Path) -> list[Token]:
    return [token for token in tokens(page) if token.type in ("fence", "code_block")]


def inline_code(page: Path) -> list[str]:
    return [token.content for token in tokens(page) if token.type == "code_inline"]


def links(page: Path) -> list[str]:
    """Targets of links and images."""
    found = (token.attrGet("href") or token.attrGet("src") for token in tokens(page))
    return [str(target) for target in found if target]


def anchors(page: Path) -> list[str]:
    """Of the headings, as GitHub makes them: words in lower case, between hyphens."""
    found = tokens(page)
    titles = [
        "".join(part.content for part in found[i + 1].children or [])
        for i, token in enumerate(found)
        if token.type == "heading_open"
    ]
    return [re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles]
