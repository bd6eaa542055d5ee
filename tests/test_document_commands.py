"""What the documents tell a reader to type, set, read or expect is there."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib.util
import inspect
import io
import itertools
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
import typing
from functools import cache, reduce

import pytest
import yaml

import imf_kernels
from imf_kernels.distill import config, schema
from imf_kernels.evaluate import SCORERS
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
        for metrics in re.findall(r"--metrics ([\w,]+)", line):
            assert set(metrics.split(",")) <= set(SCORERS), line


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
    for line in commands(page):
        for extras in re.findall(r"(?:^|')\.\[([\w,]+)\]", line):
            assert set(extras.split(",")) <= extras_there(), line


def test_extras_of_messages():
    """The code's messages install from a clone, as the pages do."""
    told = "\n".join(sources().values())
    assert not re.search(r"imf.kernels\[", told)
    assert {"eval", "profile"} <= set(re.findall(r"'\.\[(\w+)\]'", told)) <= extras_there()


def extras_there():
    project = tomllib.loads((pages.ROOT / "pyproject.toml").read_text())["project"]
    return set(project["optional-dependencies"])


@each_page
def test_paths(page):
    for line in commands(page):
        for path in re.findall(rf"(?:^|[ =])((?:{'|'.join(FOLDERS)})/[\w./*<>-]*)", line):
            assert "<" in path or list(pages.ROOT.glob(path.rstrip("/"))), line
    for path in pages.inline_code(page):
        if re.fullmatch(r"[\w/]+\.py", path):
            places = (pages.ROOT / path).exists(), *(pages.ROOT / "imf_kernels").rglob(path)
            assert any(places) or list((pages.ROOT / "tests").rglob(path)), path


MEANT = {name: [f"imf_kernels.{name}"] for name in imf_kernels.__all__} | {
    "cosyvoice": ["imf_kernels.hosts.cosyvoice"],
    "f5_tts": ["imf_kernels.hosts.f5_tts"],
    "model": ["imf_kernels.models.DiT", "imf_kernels.models.StepTokenDiT"],
    "sampler": ["imf_kernels.sampler", "imf_kernels.graphs.GraphSampler"],
    "service": ["imf_kernels.graphs.GraphSampler"],
    "settings": ["imf_kernels.distill.settings"],
    "state": ["imf_kernels.objectives.state"],
    "stats()": ["imf_kernels.graphs.engine.Stats"],
}
"""Where a page's `name.attribute` is to be found."""

SECTIONS = typing.get_type_hints(config.Config)
NAMED_CLASSES = {
    "objective": config.OBJECTIVES,
    "data.dataset": config.DATASETS,
    "data.collate": config.COLLATES,
}


@each_page
def test_names_and_keys(page):
    """Attributes of what is public, with a call's keywords; and keys of a run's document."""
    for code in pages.inline_code(page):
        found = re.match(r"imf_kernels(?:\.\w+)+(?=$|\()", code)
        if found:
            assert named(found[0]) is not None
        found = re.match(r"([\w()]+)\.([\w.]+)(\(.*\))?", code)
        if not found or found[1] not in MEANT.keys() | SECTIONS or code.endswith((".py", ".json")):
            continue
        if code == "model.model.flow":  # CosyVoice's
            continue
        call = ast.parse(code).body[0] if found[3] else None
        homes = [named(home) for home in MEANT.get(found[1], ())]
        right = any(fits(home, found[2], call) for home in homes)
        keys = found[2].split(".")
        right |= call is None and found[1] in SECTIONS and known(keys, found[1], SECTIONS[found[1]])
        assert right, code


def named(name):
    """What `package.module.attribute` is."""

    def inside(parent, part):
        if not hasattr(parent, part):
            importlib.import_module(f"{parent.__name__}.{part}")
        return getattr(parent, part)

    first, *rest = name.split(".")
    return reduce(inside, rest, importlib.import_module(first))


def fits(home, name, call):
    """Whether a module or class has the name, and it takes the keywords of the call."""
    if not hasattr(home, name):
        return name in getattr(home, "__annotations__", {})
    if call is None:
        return True
    outer = next(node for node in ast.walk(call) if isinstance(node, ast.Call))
    accepted = inspect.signature(getattr(home, name)).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    return open_ended or {word.arg for word in outer.keywords} - {None} <= accepted.keys()


def known(keys, path, hint):
    """Whether a document's section has such keys, by annotations, or those of what it names."""
    if not keys:
        return True
    first, *rest = keys
    if path in NAMED_CLASSES:
        classes = (schema.imported(name, path) for name in NAMED_CLASSES[path].values())
        return any(first in inspect.signature(one).parameters for one in classes)
    for one in typing.get_args(hint) or (hint,):
        if dataclasses.is_dataclass(one):
            inner = typing.get_type_hints(one)
            return first in inner and known(rest, f"{path}.{first}", inner[first])
    return False


@each_page
def test_environment_variables(page):
    for line in commands(page):
        for name in re.findall(r"\bIMF_KERNELS_[A-Z_]+\b", line):
            assert any(re.search(rf"\b{name}\b", text) for text in sources().values()), name


def test_citations():
    said = yaml.safe_load((pages.ROOT / "CITATION.cff").read_text())
    assert said["version"] == imf_kernels.__version__
    cited = {reference["url"].rpartition("/")[2] for reference in said["references"]}
    assert all(reference["authors"] for reference in said["references"])
    package = pages.ROOT / "imf_kernels"
    methods = (*(package / "objectives").glob("*.py"), package / "grids.py")
    implemented = [arxiv for path in methods for arxiv in PAPER.findall(path.read_text())]
    assert len(set(implemented)) >= 5
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
        assert set(re.findall(r"\w+", message)) - {"expected", "got"}, f"{message} is any message"
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
