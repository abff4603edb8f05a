"""Downloads from a hub on loopback: whatever goes wrong, a folder holds complete files or none."""

import errno
import gzip
import hashlib
import io
import json
import os
import random
import tarfile
from collections import namedtuple
from pathlib import Path

import huggingface_hub
import pytest
from fake_hub import FIRST, SECOND
from filelock import FileLock

from primeflow_perturbench.console import PlainConsole
from primeflow_perturbench.data import archives
from primeflow_perturbench.data import download as module
from primeflow_perturbench.data.download import BUSY, DATASETS, LOCK, STAGING, download
from primeflow_perturbench.errors import InputError

CELLS = "norman19_processed.h5ad.gz"
SPLITS = "mcfaline23_gxe_splits.tar.gz"
# Random bytes, which gzip cannot shorten.
PLAIN = random.Random(0).randbytes(30_000)
PACKED = gzip.compress(PLAIN, mtime=0)


@pytest.fixture
def hub(hub):
    """A hub with norman19."""
    hub.files[CELLS] = PACKED
    return hub


def content_of(folder) -> dict[str, bytes]:
    """Content of all files in a folder, except for the lock files."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file() and path.name not in (BUSY, LOCK)
    }


def lock(folder) -> dict:
    return json.loads((folder / LOCK).read_text())


def error_of(*arguments, **settings) -> str:
    """Message of the error that a download raises: one line."""
    with pytest.raises(InputError) as caught:
        download(*arguments, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def tar(members: dict[str, bytes], special: tarfile.TarInfo | None = None) -> bytes:
    """A gzipped tar file of files, and of one member that is not a file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        if special is not None:
            archive.addfile(special)
    return buffer.getvalue()


def link(kind: bytes, name: str, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def with_splits(hub, content) -> None:
    hub.files[SPLITS] = content
    hub.files["mcfaline23_gxe_processed.h5ad.gz"] = PACKED


def test_data_set_is_downloaded_unpacked_and_recorded(hub, tmp_path):
    output = io.StringIO()
    folder = tmp_path / "new" / "folder"
    download(["norman19"], folder, console=PlainConsole(file=output, width=30))
    assert content_of(folder) == {"norman19_processed.h5ad": PLAIN}
    record = {"size": len(PACKED), "sha256": hashlib.sha256(PACKED).hexdigest(), "unpacked_size": len(PLAIN)}
    assert lock(folder) == {"repository": "altoslabs/perturbench", "revision": FIRST, "files": {CELLS: record}}
    # One plain line, in a narrow log too.
    assert output.getvalue() == f"{folder / 'norman19_processed.h5ad'} is there (30.0 kB)\n"


def test_default_folder_is_primeflow_data_or_data(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PRIMEFLOW_DATA", raising=False)
    download(["norman19"])
    assert content_of(tmp_path / "data") == {"norman19_processed.h5ad": PLAIN}
    monkeypatch.setenv("PRIMEFLOW_DATA", str(tmp_path / "elsewhere"))
    download(["norman19"])
    assert content_of(tmp_path / "elsewhere") == {"norman19_processed.h5ad": PLAIN}


def test_second_download_contacts_the_hub_only_for_missing_files(hub, tmp_path):
    hub.files.update({"jiang24_split.csv": b"cell,train\n", "jiang24_processed.h5ad.gz": PACKED})
    download(["jiang24"], tmp_path)
    before, output = content_of(tmp_path), io.StringIO()
    hub.requests.clear()
    download(["jiang24"], tmp_path, console=PlainConsole(file=output))
    assert hub.requests == []
    assert content_of(tmp_path) == before
    assert [line.split("/")[-1] for line in output.getvalue().splitlines()] == [
        "jiang24_split.csv is already there",
        "jiang24_processed.h5ad is already there",
    ]
    (tmp_path / "jiang24_processed.h5ad").unlink()
    download(["jiang24"], tmp_path)
    assert hub.downloads("jiang24_processed.h5ad.gz") == 1
    assert hub.downloads("jiang24_split.csv") == 0
    assert content_of(tmp_path) == before


def test_all_downloads_the_files_of_every_data_set(hub, tmp_path):
    members = {
        "mcfaline23_gxe_splits/full_split.csv": b"c1,train\n",
        "mcfaline23_gxe_splits/small_split.csv": b"c1,val\n",
    }
    for dataset in DATASETS.values():
        for name in dataset.files:
            hub.files[name] = name.encode() if name.endswith(".csv") else gzip.compress(name.encode())
    hub.files[SPLITS] = tar(members)
    hub.files["README.md"] = b"part of no data set"
    download(["all"], tmp_path)
    cells = [name for dataset in DATASETS.values() for name in dataset.files if name.endswith("h5ad.gz")]
    splits = [f"{name}_split.csv" for name in ("frangieh21", "jiang24", "op3")]
    assert content_of(tmp_path) == {
        **{name.removesuffix(".gz"): name.encode() for name in cells},
        **{name: name.encode() for name in splits},
        **members,
    }


def test_broken_connection_leaves_nothing_and_the_same_command_succeeds_later(hub, tmp_path):
    hub.cuts[CELLS] = 15_000
    message = error_of(["norman19"], tmp_path)
    assert message.startswith(f"altoslabs/perturbench cannot be downloaded from {hub.endpoint} (")
    assert not [name for name in content_of(tmp_path) if not name.startswith(STAGING)]
    assert lock(tmp_path) == {"repository": "altoslabs/perturbench", "revision": FIRST, "files": {}}
    hub.cuts.clear()
    # The first attempt pinned the commit.
    hub.commits[SECOND] = {CELLS: gzip.compress(b"new")}
    hub.main = SECOND
    download(["norman19"], tmp_path)
    assert content_of(tmp_path) == {"norman19_processed.h5ad": PLAIN}


@pytest.mark.parametrize("name", ["jiang24_processed.h5ad.gz", "jiang24_split.csv"])
def test_corrupt_file_is_deleted(hub, tmp_path, name):
    split = b"cell1,train\ncell2,test\n"
    hub.files.update({"jiang24_split.csv": split, "jiang24_processed.h5ad.gz": PACKED})
    content = hub.files[name]
    hub.served[name] = content[:10] + bytes([content[10] ^ 1]) + content[11:]
    # `git hash-object` gives the second name for the content of the CSV.
    expected = hashlib.sha256(PACKED).hexdigest() if content == PACKED else "fa7ed33b0011c56224e8e68190581d5e77d8329d"
    message = error_of(["jiang24"], tmp_path)
    assert message.startswith(f"{name}: found checksum ")
    assert f"expected {expected} according to the hub" in message
    assert content_of(tmp_path) == ({"jiang24_split.csv": split} if content == PACKED else {})
    assert name not in lock(tmp_path)["files"]
    hub.served.clear()
    download(["jiang24"], tmp_path)
    assert content_of(tmp_path) == {"jiang24_split.csv": split, "jiang24_processed.h5ad": PLAIN}


BROKEN_GZIP = {
    "truncated": PACKED[:-10_000],
    "without its end": PACKED[:-8],
    "wrong CRC": PACKED[:-8] + bytes([PACKED[-8] ^ 1]) + PACKED[-7:],
    "wrong length": PACKED[:-4] + bytes([PACKED[-4] ^ 1]) + PACKED[-3:],
    "wrong block": PACKED[:10] + b"\xff" + PACKED[11:],
    "not gzip": PLAIN,
}


@pytest.mark.parametrize("content", BROKEN_GZIP.values(), ids=BROKEN_GZIP)
def test_damaged_gzip_file_with_correct_checksum_leaves_nothing(hub, tmp_path, content):
    hub.files[CELLS] = content
    assert f"{CELLS}: found a damaged archive (" in error_of(["norman19"], tmp_path, keep=True)
    assert content_of(tmp_path) == {}
    assert lock(tmp_path)["files"] == {}


@pytest.mark.parametrize("top", ["mcfaline23_gxe_splits/", "./mcfaline23_gxe_splits/", "", "./"])
def test_tar_file_becomes_a_folder(hub, tmp_path, top):
    extra = {"._mcfaline23_gxe_splits": b"resource fork", f"{top}._full_split.csv": b"resource fork"}
    with_splits(hub, tar({f"{top}full_split.csv": b"full", f"{top}more/small_split.csv": b"small", **extra}))
    download(["mcfaline23"], tmp_path)
    assert content_of(tmp_path) == {
        "mcfaline23_gxe_splits/full_split.csv": b"full",
        "mcfaline23_gxe_splits/more/small_split.csv": b"small",
        "mcfaline23_gxe_processed.h5ad": PLAIN,
    }
    hub.requests.clear()
    download(["mcfaline23"], tmp_path)
    assert hub.requests == []


GOOD = {"mcfaline23_gxe_splits/a.csv": b"a"}
BAD_TARS = {
    "parent folder": tar(GOOD | {"mcfaline23_gxe_splits/../../evil": b"e"}),
    "parent folder first": tar(GOOD | {"../evil": b"e"}),
    "absolute path": tar(GOOD | {"/tmp/evil": b"e"}),
    "symlink": tar(GOOD, link(tarfile.SYMTYPE, "mcfaline23_gxe_splits/b.csv", "/etc/passwd")),
    "hard link": tar(GOOD, link(tarfile.LNKTYPE, "mcfaline23_gxe_splits/b.csv", "mcfaline23_gxe_splits/a.csv")),
    "pipe": tar(GOOD, link(tarfile.FIFOTYPE, "mcfaline23_gxe_splits/b.csv", "")),
    "not tar": gzip.compress(b"x" * 2000),
    "empty": tar({}),
    "truncated": gzip.compress(gzip.decompress(tar({"mcfaline23_gxe_splits/a.csv": b"a" * 5000}))[:2000]),
}


@pytest.mark.parametrize("content", BAD_TARS.values(), ids=BAD_TARS)
def test_damaged_or_unsafe_tar_file_leaves_nothing(hub, tmp_path, content):
    with_splits(hub, content)
    folder = tmp_path / "within" / "folder"
    assert f"{SPLITS}: found " in error_of(["mcfaline23"], folder)
    assert content_of(tmp_path) == {}
    assert [path.name for path in folder.iterdir() if path.is_dir()] == []
    assert lock(folder)["files"] == {}


def test_force_downloads_again_and_replaces(hub, tmp_path):
    with_splits(hub, tar(GOOD))
    download(["mcfaline23"], tmp_path)
    before = content_of(tmp_path)
    (tmp_path / "mcfaline23_gxe_splits" / "a.csv").write_bytes(b"changed")
    (tmp_path / "mcfaline23_gxe_splits" / "b.csv").write_bytes(b"new")
    (tmp_path / "mcfaline23_gxe_processed.h5ad").write_bytes(b"changed")
    download(["mcfaline23"], tmp_path, force=True)
    assert content_of(tmp_path) == before
    # A forced download that fails keeps the old file.
    hub.served["mcfaline23_gxe_processed.h5ad.gz"] = PACKED[:-1] + b"!"
    error_of(["mcfaline23"], tmp_path, force=True)
    assert content_of(tmp_path) == before


def test_keep_keeps_the_compressed_file(hub, tmp_path):
    download(["norman19"], tmp_path, keep=True)
    assert content_of(tmp_path) == {"norman19_processed.h5ad": PLAIN, CELLS: PACKED}


def test_unrecorded_or_changed_file_is_not_overwritten(hub, tmp_path):
    mine = tmp_path / "norman19_processed.h5ad"
    mine.write_bytes(b"mine")
    message = error_of(["norman19"], tmp_path)
    assert message.startswith(f"{mine}: found a file that perturbench.lock.json does not record")
    assert content_of(tmp_path) == {"norman19_processed.h5ad": b"mine"}
    assert hub.downloads(CELLS) == 0
    download(["norman19"], tmp_path, force=True)
    assert content_of(tmp_path) == {"norman19_processed.h5ad": PLAIN}
    mine.write_bytes(PLAIN + b"mine")
    assert "does not record" in error_of(["norman19"], tmp_path)
    assert content_of(tmp_path) == {"norman19_processed.h5ad": PLAIN + b"mine"}


def test_later_downloads_keep_the_commit_of_the_first(hub, tmp_path):
    hub.files["sciplex3_processed.h5ad.gz"] = gzip.compress(b"old")
    download(["norman19"], tmp_path)
    hub.commits[SECOND] = {**hub.files, "sciplex3_processed.h5ad.gz": gzip.compress(b"new")}
    hub.main = SECOND
    before = content_of(tmp_path)
    message = error_of(["sciplex3"], tmp_path, revision="main")
    assert message.startswith(f"{tmp_path / LOCK}: found commit {FIRST}, expected {SECOND}, which 'main' stands for")
    assert content_of(tmp_path) == before
    download(["sciplex3"], tmp_path)
    assert content_of(tmp_path)["sciplex3_processed.h5ad"] == b"old"
    assert lock(tmp_path)["revision"] == FIRST
    download(["sciplex3"], tmp_path, revision=FIRST)
    download(["sciplex3"], tmp_path / "other")
    assert content_of(tmp_path / "other") == {"sciplex3_processed.h5ad": b"new"}


def test_what_a_killed_download_left_is_removed(hub, tmp_path):
    with_splits(hub, tar(GOOD))
    stale = tmp_path / STAGING / "mcfaline23_gxe_splits"
    stale.mkdir(parents=True)
    (stale / "stale.csv").write_bytes(b"stale")
    (tmp_path / STAGING / "mcfaline23_gxe_processed.h5ad").write_bytes(b"half")
    download(["mcfaline23"], tmp_path)
    assert content_of(tmp_path) == GOOD | {"mcfaline23_gxe_processed.h5ad": PLAIN}


def test_unknown_name_is_an_error_with_a_suggestion(hub, tmp_path):
    assert error_of(["norman"], tmp_path) == (
        "data set 'norman': found no such name, expected one of norman19, sciplex3, frangieh21, jiang24, op3, "
        "mcfaline23 or all; did you mean 'norman19'?"
    )
    assert hub.requests == []


def test_file_revision_or_repository_that_the_hub_lacks_is_an_error(hub, tmp_path):
    message = error_of(["norman19", "frangieh21"], tmp_path)
    assert message.startswith(f"frangieh21_split.csv: found no such file in altoslabs/perturbench at {hub.endpoint}")
    message = error_of(["norman19"], tmp_path, revision="v9")
    assert message.startswith(f"altoslabs/perturbench: found no revision 'v9' at {hub.endpoint}")
    hub.repository = "someone/else"
    message = error_of(["norman19"], tmp_path)
    assert message.startswith(f"altoslabs/perturbench cannot be downloaded from {hub.endpoint} (")
    assert "404" in message
    assert content_of(tmp_path) == {}
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize(("path", "status"), [("/api/datasets", 503), ("/datasets", 404), ("/datasets", 503)])
def test_refusal_by_the_hub_is_an_error(hub, tmp_path, path, status):
    hub.status[path] = status
    message = error_of(["norman19"], tmp_path)
    assert str(status) in message
    assert hub.endpoint in message
    hub.status.clear()
    download(["norman19"], tmp_path)
    assert content_of(tmp_path) == {"norman19_processed.h5ad": PLAIN}


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "127.0.0.1:9"])
def test_unreachable_hub_is_an_error(hub, tmp_path, monkeypatch, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    message = error_of(["norman19"], tmp_path)
    assert message.startswith(f"altoslabs/perturbench cannot be downloaded from {endpoint} (")


@pytest.mark.parametrize("answer", [b"<html>log in</html>", b"{}", b"[1]", b"null"])
def test_answer_that_is_not_the_hubs_is_an_error(hub, tmp_path, answer):
    hub.api_answer = answer
    assert error_of(["norman19"], tmp_path).startswith(
        f"altoslabs/perturbench cannot be downloaded from {hub.endpoint}"
    )


def test_too_little_disk_space_is_reported_before_downloading(hub, tmp_path, monkeypatch):
    usage = namedtuple("Usage", "free")
    # Both the packed and the unpacked file need room.
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: usage(2 * len(PACKED) - 1))
    message = error_of(["norman19"], tmp_path)
    assert message.startswith(f"{tmp_path}: found 60.1 kB free on the disk, expected at least 60.1 kB")
    assert hub.downloads(CELLS) == 0
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: usage(2 * len(PACKED)))
    download(["norman19"], tmp_path)
    assert content_of(tmp_path) == {"norman19_processed.h5ad": PLAIN}


def full(*arguments, **settings) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_is_reported_and_a_finished_download_is_kept(hub, tmp_path, monkeypatch):
    expected = f"{tmp_path}: found 'No space left on device', expected a writable folder; "
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "hf_hub_download", full)
        assert error_of(["norman19"], tmp_path).startswith(expected)
    with monkeypatch.context() as patch:
        patch.setattr(archives.gzip, "open", full)
        assert error_of(["norman19"], tmp_path).startswith(expected)
    hub.requests.clear()
    download(["norman19"], tmp_path)
    assert hub.downloads(CELLS) == 0
    assert content_of(tmp_path) == {"norman19_processed.h5ad": PLAIN}


def test_folder_that_cannot_be_written_is_an_error(hub, tmp_path):
    (tmp_path / "file").write_text("mine")
    message = error_of(["norman19"], tmp_path / "file")
    assert message.startswith(f"{tmp_path / 'file'}: found 'File exists', expected a writable folder")
    if os.geteuid() != 0:  # Root may write everywhere.
        (tmp_path / "closed").mkdir(mode=0o555)
        assert "found 'Permission denied', expected a writable folder" in error_of(["norman19"], tmp_path / "closed")


def test_second_download_into_a_folder_at_the_same_time_is_an_error(hub, tmp_path):
    with FileLock(tmp_path / BUSY):
        message = error_of(["norman19"], tmp_path)
    assert message.startswith(f"{tmp_path}: found another download into this folder")
    assert hub.requests == []


@pytest.mark.parametrize("content", ["", "[]", '{"files": {}}', '{"revision": null, "files": 3}'])
def test_lock_file_with_other_content_is_an_error(hub, tmp_path, content):
    (tmp_path / LOCK).write_text(content)
    assert error_of(["norman19"], tmp_path).startswith(f"{tmp_path / LOCK}: found content that is not a lock file")
    assert (tmp_path / LOCK).read_text() == content
