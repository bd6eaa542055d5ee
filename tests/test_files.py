import os
import stat

import pytest

from imf_kernels.files import replacing


def test_a_write_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), replacing(path) as temporary:
        temporary.write_text("half \udc80", encoding="utf-8")
    assert path.read_text() == "old"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_files_get_the_permissions_of_any_new_file_whoever_writes_them(tmp_path):
    plain, private = tmp_path / "plain.json", tmp_path / "private.bin"
    before = os.umask(0o027)
    try:
        with replacing(plain) as temporary:
            temporary.write_text("new")
        with replacing(private) as temporary:  # as safetensors does
            (tmp_path / "other").touch(0o600)
            (tmp_path / "other").replace(temporary)
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (plain, private)] == [0o640] * 2


def test_writers_of_one_number_do_not_meet(tmp_path, monkeypatch):
    """Processes on two machines may have the same."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    path = tmp_path / "result.json"
    with replacing(path) as one:
        one.write_text("one")
        with replacing(path) as other:
            other.write_text("other")
        assert path.read_text() == "other"
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_directory_is_named(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match=r"path: .* got no .*missing$"),
        replacing(tmp_path / "missing" / "result.json"),
    ):
        pass
