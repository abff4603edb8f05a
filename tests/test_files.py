"""Atomic writes, JSON, YAML and SHA-256 of files."""

import json
import os
import subprocess
import sys

import pytest

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.files import file_hash, read_json, read_yaml, replacing, write_json


def test_replacing_creates_folders_and_leaves_only_the_file(tmp_path):
    path = tmp_path / "new" / "folder" / "file.txt"
    with replacing(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_replacing_keeps_the_previous_file_after_an_error(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("before")

    def write_half():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        write_half()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    here, other = f".{{}}.{os.uname().nodename}-{{}}.part", ".a.another-machine-{}.part"
    names = [here.format("a", killed.pid), here.format("b", os.getpid()), other.format(killed.pid), ".mine.part"]
    for name in names:
        (tmp_path / name).write_text("half")
    with replacing(tmp_path / "c") as temporary:
        temporary.write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names[1:], "c"])


def test_write_json_can_be_read_back(tmp_path):
    content = {"metric": [1, 0.5, None], "name": "ü"}
    write_json(tmp_path / "record.json", content)
    assert json.loads((tmp_path / "record.json").read_text()) == content


def test_file_hash_is_the_sha256_of_the_content(tmp_path):
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    # FIPS 180-2, appendix B.1.
    assert file_hash(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "aliases that stand for more than"),
        ("a: &a [*a]", "aliases that stand for more than"),
        ("[" * 5000, "more than 100 lists or mappings|nesting depth"),
        ("a:\n" + "".join(" " * i + "- \n" for i in range(1, 300)), "more than 100 lists or mappings"),
        ("a: [1", "in line"),
        ("a: *b", "undefined alias|stand for more"),
        ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("\0", "not YAML"),
        ("a: 2020-99-99", "not YAML"),
        (None, "no readable file"),
    ],
)
def test_yaml_that_is_too_large_or_invalid_is_refused_at_once(text, reason, tmp_path):
    path = tmp_path / "x.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=reason) as refused:
        read_yaml(path)
    assert str(refused.value).startswith(str(path))
    assert len(str(refused.value)) < len(str(path)) + 200


def test_yaml_may_use_a_few_aliases(tmp_path):
    (tmp_path / "x.yaml").write_text("a: &a [1, 2]\nb: *a\nc: 'é'\n", encoding="utf-8")
    assert read_yaml(tmp_path / "x.yaml") == {"a": [1, 2], "b": [1, 2], "c": "é"}


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b"\xff\xfe\x00", b"", None])
def test_json_that_is_invalid_is_refused(content, tmp_path):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match="x.json: found "):
        read_json(path)


def test_a_folder_is_no_file(tmp_path):
    for read in (read_json, read_yaml):
        with pytest.raises(InputError, match="no readable file"):
            read(tmp_path)
