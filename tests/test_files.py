"""Atomic writes, JSON and SHA-256 of files."""

import json
import os
import subprocess
import sys

import pytest

from primeflow_perturbench.files import file_hash, replacing, write_json


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
