"""The site that `make docs` builds: the pages, and a reference from the docstrings."""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path
from types import ModuleType

from sphinx.application import Sphinx

import imf_kernels
from imf_kernels import hosts

project, release = "imf_kernels", imf_kernels.__version__
author = project_copyright = "The imf_kernels developers"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"imf_kernels {release}"
exclude_patterns = ["figures"]
myst_heading_anchors = 3

default_role = "py:obj"  # a docstring's `code`: a link where it names something
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True  # `buckets=DEFAULT`, not the 42 of them
autodoc_typehints_format = "short"
napoleon_use_param = False  # it would take `t, r: ...` for a type and a name
napoleon_custom_sections = [("Attributes", "params_style")]
nitpick_ignore_regex = [
    ("py:obj", r"[\s\S]*"),  # most code names nothing
    (
        "py:class",
        r"(torch|collections|contextlib|os|pathlib)\..*|ExportedProgram|Module|Path|Tensor",
    ),  # other libraries'
]
INTERNAL = (  # in signatures, not exported
    "distill.plain.Student",
    "graphs.buckets.AnyBucket",
    "hosts.cosyvoice.live.Frozen",
    "models.conditioning.Layout",
    "models.conformer.Span",
    "models.estimator.Estimator",
    "models.lookahead.Kept",
    "models.positions.Rope",
    "models.scope.CacheSizes",
    "models.scope.Extension",
    "models.scope.Whole",
    "o3s.sharding.Items",
    "o3s.sharding.Sharded",
    "rows.Rows",
)
nitpick_ignore = [("py:class", f"imf_kernels.{name}") for name in INTERNAL] + [
    ("py:exc", "Locked"),
    ("py:class", "P"),  # variables of types
    ("py:class", "imf_kernels.profiling.T"),
]


def public_modules() -> list[str]:
    """What `imf_kernels` lists, and each host."""
    listed = [getattr(imf_kernels, name) for name in imf_kernels.__all__]
    rooms = pkgutil.iter_modules(hosts.__path__, f"{hosts.__name__}.")
    return [
        imf_kernels.__name__,
        *(module.__name__ for module in listed if isinstance(module, ModuleType)),
        *(room.name for room in rooms if room.ispkg),
    ]


def write_reference(app: Sphinx) -> None:
    """A page for each public module, of what it exports."""
    folder = Path(app.srcdir) / "api"
    folder.mkdir(exist_ok=True)
    names = public_modules()
    elsewhere = {
        name: room
        for name in imf_kernels.__all__
        for room in names[1:]
        if getattr(getattr(imf_kernels, name), "__module__", "").startswith(room)
    }
    for name in names:
        page = f"{name}\n{'=' * len(name)}\n\n.. automodule:: {name}\n   :members:\n"
        if name == imf_kernels.__name__:
            page += f"   :exclude-members: {', '.join(elsewhere)}\n\n"
            page += "".join(f"- :py:obj:`{room}.{name}`\n" for name, room in elsewhere.items())
        path = folder / f"{name}.rst"
        if not path.exists() or path.read_text() != page:
            path.write_text(page)


ROOT = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/REPORT.md": "report.md",
    "benchmarks/TUNING.md": "tuning.md",
}


def from_pages(app: Sphinx, name: str, text: list[str]) -> None:
    """Links of pages to files outside of `docs/` that stand in the site."""
    for file, page in ROOT.items():
        text[0] = text[0].replace(f"](../{file}", f"]({page}")


def from_root(app: Sphinx, path: Path, parent: str, text: list[str]) -> None:
    """Links of these files, as they are included."""
    folder = path.parent.as_posix()
    linked = re.sub(r"\]\((?!https?:|#)", f"]({folder}/", text[0])
    text[0] = linked.replace(f"]({folder}/../docs/", "](").replace("](../docs/", "](")
    from_pages(app, parent, text)


def readable(app: Sphinx, kind: str, name: str, found: object, options: object, *shown: str | None):
    """A signature without dataclasses' `<factory>`, which is no Python."""
    return tuple(part and part.replace("<factory>", "...") for part in shown)


def without_aliases(
    app: Sphinx, kind: str, name: str, found: object, options: object, lines: list[str]
) -> None:
    """Fields of named tuples without the docstrings that Python gives them."""
    if lines and lines[0].startswith("Alias for field number"):
        lines.clear()


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", write_reference)
    app.connect("source-read", from_pages)
    app.connect("include-read", from_root)
    app.connect("autodoc-process-signature", readable)
    app.connect("autodoc-process-docstring", without_aliases)
