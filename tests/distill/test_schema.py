from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from imf_kernels.distill.schema import ConfigError, arguments, imported, make


@dataclass(frozen=True, kw_only=True)
class Inner:
    a: float = 1.0

    def __post_init__(self):
        if self.a < 0:
            raise ValueError(f"a: expected a number >= 0, got {self.a}")


class Hidden:
    def __init__(self, teacher: Any, *, depth: int) -> None:
        self.teacher, self.depth = teacher, depth


@dataclass(frozen=True, kw_only=True)
class Outer:
    count: int
    lr: float = 0.1
    name: str = ""
    on: bool = False
    path: Path | None = None
    kind: Literal["x", "y"] = "x"
    pair: tuple[float, float] = (0.0, 1.0)
    items: Sequence[int] = ()
    inner: Inner | None = None
    table: Mapping[str, float] = field(default_factory=dict)
    call: Callable[[int], int] | None = None
    grid: str | Sequence[float] = "uniform"
    free: Any = None


def test_values_become_what_annotations_ask_for():
    made = make(
        Outer,
        {
            "count": 3,
            "lr": "1e-4",  # YAML 1.1 takes this for a text
            "on": True,
            "path": "a/b",
            "kind": "y",
            "pair": [0, 2],
            "items": [1, 2],
            "inner": {"a": 2},
            "table": {"k": 1},
            "call": "math:isqrt",
            "grid": [0, "0.5", 1],
            "free": {"any": ["thing"]},
        },
        "",
    )
    assert made == Outer(
        count=3,
        lr=1e-4,
        on=True,
        path=Path("a/b"),
        kind="y",
        pair=(0.0, 2.0),
        items=(1, 2),
        inner=Inner(a=2.0),
        table={"k": 1.0},
        call=imported("math:isqrt", ""),
        grid=(0.0, 0.5, 1.0),
        free={"any": ["thing"]},
    )
    assert isinstance(made.lr, float)
    assert isinstance(made.pair[0], float)
    assert make(Outer, {"count": 1, "inner": None, "grid": "sway"}, "").grid == "sway"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "run.count: expected an integer, got nothing"),
        (None, "run.count: expected an integer, got nothing"),
        ([1], r"run: expected a mapping, got \[1\]"),
        ({"count": 1, "conut": 2}, "run.conut: expected one of count, lr, .*, got this key"),
        ({"count": 1.0}, "run.count: expected an integer, got 1.0"),
        ({"count": True}, "run.count: expected an integer, got True"),
        ({"count": None}, "run.count: expected an integer, got None"),
        ({"count": 1, "lr": "fast"}, "run.lr: expected a number, got 'fast'"),
        ({"count": 1, "lr": False}, "run.lr: expected a number, got False"),
        ({"count": 1, "name": 3}, "run.name: expected a text, got 3"),
        ({"count": 1, "on": "yes"}, "run.on: expected true or false, got 'yes'"),
        ({"count": 1, "path": 3}, "run.path: expected a path or null, got 3"),
        ({"count": 1, "kind": "z"}, "run.kind: expected one of x, y, got 'z'"),
        ({"count": 1, "items": [1, "b"]}, r"run.items\[1\]: expected an integer, got 'b'"),
        ({"count": 1, "items": 3}, "run.items: expected a list of an integer, got 3"),
        ({"count": 1, "pair": [0]}, r"run.pair: expected 2 values, got \[0\]"),
        ({"count": 1, "inner": {"b": 1}}, "run.inner.b: expected one of a, got this key"),
        ({"count": 1, "inner": {"a": "x"}}, "run.inner.a: expected a number, got 'x'"),
        ({"count": 1, "inner": {"a": -1}}, "run.inner.a: expected a number >= 0, got -1.0"),
        ({"count": 1, "inner": 3}, "run.inner: expected a mapping or null, got 3"),
        ({"count": 1, "table": {"k": "x"}}, "run.table.k: expected a number, got 'x'"),
        ({"count": 1, "call": "isqrt"}, "run.call: expected 'package.module:function'"),
        ({"count": 1, "call": "math:nothing"}, "run.call: cannot import 'math:nothing'"),
        ({"count": 1, "call": "no_such.place:f"}, "run.call: cannot import 'no_such.place:f'"),
        ({"count": 1, "grid": 2}, "run.grid: expected a text or a list of a number, got 2"),
    ],
)
def test_errors_name_the_path(given, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        make(Outer, given, "run")


@dataclass(frozen=True, kw_only=True)
class Other:
    a: float = 2.0
    b: float = 3.0


def test_a_mapping_is_the_first_class_of_a_union_that_has_all_its_keys():
    def either(inner: Inner | Other | None = None) -> Inner | Other | None:
        return inner

    assert make(either, {"inner": {"b": 1}}, "run") == Other(b=1.0)
    assert make(either, {"inner": {"a": 4, "b": 1}}, "run") == Other(a=4.0, b=1.0)
    assert make(either, {"inner": {"a": 4}}, "run") == Inner(a=4.0)
    assert make(either, {"inner": {}}, "run") == Inner()
    with pytest.raises(ConfigError, match=r"^run\.inner\.c: expected one of a, got this key"):
        make(either, {"inner": {"c": 2}}, "run")
    with pytest.raises(ConfigError, match=r"^run\.inner\.b: expected a number, got 'x'"):
        make(either, {"inner": {"b": "x"}}, "run")


def test_hidden_parameters_are_given_by_the_caller():
    made = make(Hidden, {"depth": 2}, "model", fixed={"teacher": "t"})
    assert (made.teacher, made.depth) == ("t", 2)
    with pytest.raises(ConfigError, match=r"model\.teacher: expected one of depth, got this key"):
        make(Hidden, {"depth": 2, "teacher": "mine"}, "model", fixed={"teacher": "t"})
    assert arguments(Hidden, {"depth": 1}, "model", hidden={"teacher"}) == {"depth": 1}


def test_a_function_that_takes_anything():
    def build(size: int, **options: Any) -> tuple[int, dict[str, Any]]:
        return size, options

    assert make(build, {"size": 2, "other": 3}, "model") == (2, {"other": 3})


def test_errors_of_the_document_itself_have_no_path():
    with pytest.raises(ConfigError, match=r"^count: expected an integer, got nothing"):
        make(Outer, {}, "")
