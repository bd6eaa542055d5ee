"""What the documents tell a reader to type, set, read or expect is there."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import itertools
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from functools import cache, reduce

import pytest
import yaml

import imf_kernels
from tests import pages

OURS = ("benchmarks", "docs", "examples", "imf_kernels")
FOLDERS = (*OURS, "csrc", "recipes", "tests")
PAPER = re.compile(r"arXiv (\d{4}\.\d{5})")
each_page = pytest.mark.parametrize("page", pages.PAGES, ids=pages.name)


def commands(page):
    """The shell's lines, and what stands as code within text."""
    text = "\n".join(pages.blocks(page, "bash")).replace("\\\n", " ")
    return [*text.splitlines(), *(code.replace("\n", " ") for code in pages.inline_code(page))]


@each_page
def test_blocks_are_of_a_language_that_is_checked(page):
    for fence in pages.fences(page):
        assert fence.info in ("python", "bash", "yaml", "cpp", "text") or fence.info[:1] == "{"


@each_page
def test_shell(page):
    for block in pages.blocks(page, "bash"):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)


@each_page
def test_yaml(page):
    for block in pages.blocks(page, "yaml"):
        assert yaml.safe_load(block)


@each_page
def test_make_targets(page):
    targets = re.findall(r"^([a-z-]+):", (pages.ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in commands(page):
        for target in re.findall(r"(?:^|[;&] *)make ([a-z-]+)", line):
            assert target in targets, line


@each_page
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning:runpy")
def test_modules_and_their_options(page):
    for line in commands(page):
        if " -m " not in f" {line}":
            continue
        words = shlex.split(line, comments=True)
        module, given = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
        assert importlib.util.find_spec(module), line
        options = [word.partition("=")[0] for word in given if word.startswith("--")]
        if options and module.split(".")[0] in OURS:
            told = usage(module)
            for option in options:
                assert re.search(rf"{option}\b", told), line


@cache
def usage(module):
    """What a module of ours tells of its options."""
    told = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(told):
        patch.setattr(sys, "argv", [module, "--help"])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    return told.getvalue()


@each_page
def test_extras(page):
    project = tomllib.loads((pages.ROOT / "pyproject.toml").read_text())["project"]
    for line in commands(page):
        for extras in re.findall(r"(?:^|')\.\[([\w,]+)\]", line):
            assert set(extras.split(",")) <= set(project["optional-dependencies"]), line


@each_page
def test_paths(page):
    for line in commands(page):
        for path in re.findall(rf"(?:^|[ =])((?:{'|'.join(FOLDERS)})/[\w./*<>-]*)", line):
            assert "<" in path or list(pages.ROOT.glob(path.rstrip("/"))), line


@each_page
def test_names(page):
    for code in pages.inline_code(page):
        for name in re.findall(r"^imf_kernels(?:\.\w+)+(?=$|\()", code):
            assert named(name) is not None


def named(name):
    """What `package.module.attribute` is."""

    def inside(parent, part):
        if not hasattr(parent, part):
            importlib.import_module(f"{parent.__name__}.{part}")
        return getattr(parent, part)

    first, *rest = name.split(".")
    return reduce(inside, rest, importlib.import_module(first))


@each_page
def test_environment_variables(page):
    for line in commands(page):
        for name in re.findall(r"\bIMF_KERNELS_[A-Z_]+\b", line):
            assert any(name in text for text in sources().values()), name


def test_citations():
    said = yaml.safe_load((pages.ROOT / "CITATION.cff").read_text())
    assert said["version"] == imf_kernels.__version__
    cited = {reference["url"].rpartition("/")[2] for reference in said["references"]}
    assert all(reference["authors"] for reference in said["references"])
    objectives = (pages.ROOT / "imf_kernels/objectives").glob("*.py")
    implemented = [arxiv for path in objectives for arxiv in PAPER.findall(path.read_text())]
    assert len(set(implemented)) >= 4
    assert cited >= {*implemented, *PAPER.findall(pages.README.read_text())}


def test_messages_are_those_of_the_code():
    """In Troubleshooting, bold code is a message; … is what varies in it."""
    found = pages.tokens(pages.ROOT / "docs/troubleshooting.md")
    messages = [
        token.content
        for before, token in itertools.pairwise(found)
        if token.type == "code_inline" and before.type == "strong_open" and " " in token.content
    ]
    assert len(messages) > 20
    said = "\n".join(text for source in sources().values() for text in strings(source))
    for message in messages:
        parts = [re.escape(part) for part in message.split("…")]
        assert re.search("[^\n]*".join(parts), said), message


@cache
def sources():
    paths = [*(pages.ROOT / "imf_kernels").rglob("*.py"), pages.ROOT / "setup.py"]
    return {path: path.read_text() for path in paths}


def strings(source):
    """The strings of a program, a line each, with … in place of what is formatted."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            yield "".join(map(str, parts)).replace("\n", " ")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value.replace("\n", " ")
