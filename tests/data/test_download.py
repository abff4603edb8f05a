"""Downloads against a hub on loopback: whatever goes wrong, a folder holds whole files or none."""

import errno
import gzip
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections import namedtuple
from pathlib import Path

import pytest
from fake_hub import CHUNK, FIRST, SECOND
from filelock import FileLock
from rich.console import Console

from primeflow_perturbench.data.download import fetch as module
from primeflow_perturbench.data.download import hub as hub_module
from primeflow_perturbench.data.download import unpack
from primeflow_perturbench.data.download.catalogue import DATASETS
from primeflow_perturbench.data.download.fetch import download
from primeflow_perturbench.errors import InputError

CELLS = "norman19_processed.h5ad.gz"
SPLITS = "mcfaline23_gxe_splits.tar.gz"
# Bytes that gzip cannot shorten, so that a place in the packed file is a place in the plain one.
PLAIN = random.Random(0).randbytes(300_000)
PACKED = gzip.compress(PLAIN, mtime=0)


@pytest.fixture
def hub(hub):
    """A hub with norman19."""
    hub.files[CELLS] = PACKED
    return hub


def held(folder) -> dict[str, bytes]:
    """Everything that lies in a folder, but for the file that holds off a second download."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file() and path.name != module.BUSY
    }


def data(folder) -> dict[str, bytes]:
    """What lies in a folder beside the lock file."""
    return {name: content for name, content in held(folder).items() if name != module.LOCK}


def lock(folder) -> dict:
    return json.loads((folder / module.LOCK).read_text())


def refusal(*arguments, **settings) -> str:
    """The sentence with which a download is refused."""
    with pytest.raises(InputError) as caught:
        download(*arguments, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def command(folder) -> subprocess.Popen:
    """``primeflow data download norman19`` in a process of its own."""
    code = (
        "import sys, huggingface_hub.constants as constants; from primeflow_perturbench.cli import main; "
        f"constants.DOWNLOAD_CHUNK_SIZE = {CHUNK}; sys.argv[:1] = ['primeflow', 'data', 'download', 'norman19']; main()"
    )
    arguments = [sys.executable, "-c", code, "--folder", str(folder)]
    return subprocess.Popen(
        arguments, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def tar(members: dict[str, bytes], special: tarfile.TarInfo | None = None) -> bytes:
    """A gzipped tar file of files, and of one member that is none."""
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


def test_a_data_set_is_fetched_unpacked_and_recorded(hub, tmp_path):
    output = io.StringIO()
    download(["norman19"], tmp_path / "new" / "folder", console=Console(file=output, width=30))
    folder = tmp_path / "new" / "folder"
    assert data(folder) == {"norman19_processed.h5ad": PLAIN}
    record = {"size": len(PACKED), "sha256": hashlib.sha256(PACKED).hexdigest(), "unpacked_size": len(PLAIN)}
    assert lock(folder) == {"repository": "altoslabs/perturbench", "revision": FIRST, "files": {CELLS: record}}
    # One plain line to a file, in a narrow log too.
    assert output.getvalue() == f"{folder / 'norman19_processed.h5ad'} is there (300.0 kB)\n"


def test_the_folder_is_primeflow_data_or_data(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PRIMEFLOW_DATA", raising=False)
    download(["norman19"])
    assert data(tmp_path / "data") == {"norman19_processed.h5ad": PLAIN}
    monkeypatch.setenv("PRIMEFLOW_DATA", str(tmp_path / "elsewhere"))
    download(["norman19"])
    assert data(tmp_path / "elsewhere") == {"norman19_processed.h5ad": PLAIN}


def test_a_second_run_asks_nothing(hub, tmp_path):
    hub.files["norman19_split.csv"] = b"cell,train\n"
    download(["norman19"], tmp_path)
    before, output = held(tmp_path), io.StringIO()
    hub.requests.clear()
    download(["norman19"], tmp_path, console=Console(file=output))
    assert hub.requests == []
    assert held(tmp_path) == before
    assert [line.split("/")[-1] for line in output.getvalue().splitlines()] == [
        "norman19_split.csv is already there",
        "norman19_processed.h5ad is already there",
    ]
    # What is missing, and that alone, is fetched.
    (tmp_path / "norman19_processed.h5ad").unlink()
    download(["norman19"], tmp_path)
    assert hub.of_file(CELLS)
    assert not hub.of_file("norman19_split.csv")
    assert held(tmp_path) == before


def test_every_data_set_is_fetched_with_its_files(hub, tmp_path):
    members = {
        "mcfaline23_gxe_splits/full_split.csv": b"c1,train\n",
        "mcfaline23_gxe_splits/small_split.csv": b"c1,val\n",
    }
    for dataset in DATASETS.values():
        for name in dataset.files:
            hub.files[name] = name.encode() if name.endswith(".csv") else gzip.compress(name.encode())
    hub.files[SPLITS] = tar(members)
    hub.files["README.md"] = b"not asked for"
    hub.files["sciplex3_split.csv"] = b"optional"
    download(["all"], tmp_path)
    expected = {f"{name}_processed.h5ad": f"{name}_processed.h5ad.gz" for name in DATASETS if name != "mcfaline23"}
    expected["mcfaline23_gxe_processed.h5ad"] = "mcfaline23_gxe_processed.h5ad.gz"
    expected |= {f"{name}_split.csv": f"{name}_split.csv" for name in ("frangieh21", "jiang24", "op3")}
    expected = {path: content.encode() for path, content in expected.items()}
    assert data(tmp_path) == {**expected, **members, "sciplex3_split.csv": b"optional"}


@pytest.mark.parametrize("reset", [False, True])
def test_a_cut_connection_is_resumed_where_it_broke(hub, tmp_path, reset):
    # More often than fruitless attempts are made: every one of these brings something.
    places = [50_000, 100_000, 150_000, 200_000, 250_000]
    hub.cuts[CELLS], hub.reset = list(places), reset
    download(["norman19"], tmp_path)
    assert data(tmp_path) == {"norman19_processed.h5ad": PLAIN}
    answers = hub.of_file(CELLS)
    assert answers[0].range is None
    starts = [int(answer.range[len("bytes=") : -1]) for answer in answers[1:]]
    # No more than a chunk of what had come is asked for again.
    assert all(place - CHUNK <= start <= place for start, place in zip(starts, places, strict=True))
    assert sum(answer.sent for answer in answers) <= len(PACKED) + 5 * CHUNK
    # A place in a compressed answer would be none in the file.
    assert {answer.encoding for answer in answers} == {"identity"}


def test_a_connection_that_stays_broken_leaves_bytes_that_the_same_command_continues(hub, tmp_path):
    hub.cuts[CELLS] = [150_000] * 100
    said = refusal(["norman19"], tmp_path)
    (unfinished,) = data(tmp_path)
    kept = data(tmp_path)[unfinished]
    assert unfinished.endswith(".incomplete")
    assert kept == PACKED[: len(kept)]
    assert 150_000 - CHUNK <= len(kept) <= 150_000
    assert said.startswith(f"{CELLS}: the connection to {hub.endpoint} broke at {len(kept):,} of {len(PACKED):,} bytes")
    assert said.endswith("the same command continues there")
    hub.cuts.clear()
    hub.requests.clear()
    download(["norman19"], tmp_path)
    assert data(tmp_path) == {"norman19_processed.h5ad": PLAIN}
    assert [(r.range, r.sent) for r in hub.of_file(CELLS)] == [(f"bytes={len(kept)}-", len(PACKED) - len(kept))]


def test_a_killed_download_goes_on(hub, tmp_path):
    hub.stall[CELLS] = 200_000
    process = command(tmp_path)
    try:
        deadline = time.monotonic() + 60
        while not any(file.stat().st_size > 150_000 for file in tmp_path.glob("*.incomplete")):
            assert process.poll() is None
            assert time.monotonic() < deadline
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    (unfinished,) = data(tmp_path)
    start = len(data(tmp_path)[unfinished])
    assert unfinished.endswith(".incomplete")
    hub.stall.clear()
    hub.go.set()
    hub.requests.clear()
    download(["norman19"], tmp_path)
    assert data(tmp_path) == {"norman19_processed.h5ad": PLAIN}
    assert [(r.range, r.sent) for r in hub.of_file(CELLS)] == [(f"bytes={start}-", len(PACKED) - start)]


@pytest.mark.parametrize("name", [CELLS, "norman19_split.csv"])
def test_a_corrupt_file_is_removed(hub, tmp_path, name):
    hub.files["norman19_split.csv"] = b"cell1,train\ncell2,test\n"
    content = hub.files[name]
    hub.served[name] = content[:10] + bytes([content[10] ^ 1]) + content[11:]
    said = refusal(["norman19"], tmp_path)
    digest = hashlib.sha256(content).hexdigest()
    if name.endswith(".csv"):  # which git itself names: `git hash-object` says the same
        digest = "fa7ed33b0011c56224e8e68190581d5e77d8329d"
    assert said.startswith(f"{name}: found checksum ")
    assert f"expected {digest} as the hub has it" in said
    before = {} if name.endswith(".csv") else {"norman19_split.csv": hub.files["norman19_split.csv"]}
    assert data(tmp_path) == before
    assert name not in lock(tmp_path)["files"]
    hub.served.clear()
    download(["norman19"], tmp_path)
    assert set(data(tmp_path)) == {"norman19_processed.h5ad", "norman19_split.csv"}


BROKEN_GZIP = {
    "cut short": PACKED[:-100_000],
    "without its end": PACKED[:-8],
    "wrong CRC": PACKED[:-8] + bytes([PACKED[-8] ^ 1]) + PACKED[-7:],
    "wrong length": PACKED[:-4] + bytes([PACKED[-4] ^ 1]) + PACKED[-3:],
    "wrong block": PACKED[:10] + b"\xff" + PACKED[11:],
    "no gzip": PLAIN,
}


@pytest.mark.parametrize("content", BROKEN_GZIP.values(), ids=BROKEN_GZIP)
def test_a_broken_gzip_file_leaves_nothing_though_its_checksum_is_right(hub, tmp_path, content):
    hub.files[CELLS] = content
    said = refusal(["norman19"], tmp_path, keep=True)
    assert said.startswith(f"{CELLS}: found a damaged gzip file (")
    assert data(tmp_path) == {}
    assert lock(tmp_path)["files"] == {}


def with_splits(hub, content) -> None:
    hub.files[SPLITS] = content
    hub.files["mcfaline23_gxe_processed.h5ad.gz"] = PACKED


@pytest.mark.parametrize("top", ["mcfaline23_gxe_splits/", "./mcfaline23_gxe_splits/", "", "./"])
def test_a_tar_file_becomes_its_folder(hub, tmp_path, top):
    extra = {"._mcfaline23_gxe_splits": b"resource fork", f"{top}._full_split.csv": b"resource fork"}
    with_splits(hub, tar({f"{top}full_split.csv": b"full", f"{top}more/small_split.csv": b"small", **extra}))
    download(["mcfaline23"], tmp_path)
    assert data(tmp_path) == {
        "mcfaline23_gxe_splits/full_split.csv": b"full",
        "mcfaline23_gxe_splits/more/small_split.csv": b"small",
        "mcfaline23_gxe_processed.h5ad": PLAIN,
    }
    hub.requests.clear()
    download(["mcfaline23"], tmp_path)
    assert hub.requests == []


GOOD = {"mcfaline23_gxe_splits/a.csv": b"a"}
BAD_TARS = {
    "up": tar(GOOD | {"mcfaline23_gxe_splits/../../evil": b"e"}),
    "up at once": tar(GOOD | {"../evil": b"e"}),
    "symlink": tar(GOOD, link(tarfile.SYMTYPE, "mcfaline23_gxe_splits/b.csv", "/etc/passwd")),
    "hard link": tar(GOOD, link(tarfile.LNKTYPE, "mcfaline23_gxe_splits/b.csv", "mcfaline23_gxe_splits/a.csv")),
    "pipe": tar(GOOD, link(tarfile.FIFOTYPE, "mcfaline23_gxe_splits/b.csv", "")),
    "no tar": gzip.compress(b"x" * 2000),
    "nothing": tar({}),
    "cut in a member": gzip.compress(gzip.decompress(tar({"mcfaline23_gxe_splits/a.csv": b"a" * 5000}))[:2000]),
}


@pytest.mark.parametrize("content", BAD_TARS.values(), ids=BAD_TARS)
def test_a_tar_file_that_is_damaged_or_climbs_out_leaves_nothing(hub, tmp_path, content):
    with_splits(hub, content)
    folder = tmp_path / "within" / "folder"
    said = refusal(["mcfaline23"], folder)
    assert said.startswith(f"{SPLITS}: found ")
    assert set(held(tmp_path)) == {f"within/folder/{module.LOCK}"}
    assert [path.name for path in folder.iterdir() if path.is_dir()] == []
    assert lock(folder)["files"] == {}


def test_a_tar_file_with_an_absolute_path_leaves_nothing(hub, tmp_path):
    with_splits(hub, tar(GOOD | {str(tmp_path / "evil"): b"e"}))
    said = refusal(["mcfaline23"], tmp_path / "folder")
    assert said.startswith(f"{SPLITS}: found the member '{tmp_path / 'evil'}', which is a link or leaves the folder")
    assert set(held(tmp_path)) == {f"folder/{module.LOCK}"}


def test_force_fetches_again_and_replaces(hub, tmp_path):
    with_splits(hub, tar(GOOD))
    download(["mcfaline23"], tmp_path)
    before = held(tmp_path)
    (tmp_path / "mcfaline23_gxe_splits" / "a.csv").write_bytes(b"changed")
    (tmp_path / "mcfaline23_gxe_splits" / "b.csv").write_bytes(b"new")
    (tmp_path / "mcfaline23_gxe_processed.h5ad").write_bytes(b"changed")
    hub.requests.clear()
    download(["mcfaline23"], tmp_path, force=True)
    assert sum(r.sent for r in hub.of_file("mcfaline23_gxe_processed.h5ad.gz")) == len(PACKED)
    assert held(tmp_path) == before


def test_a_forced_download_that_fails_leaves_the_old_file(hub, tmp_path):
    download(["norman19"], tmp_path)
    before = held(tmp_path)
    hub.served[CELLS] = PACKED[:-1] + b"!"
    refusal(["norman19"], tmp_path, force=True)
    assert held(tmp_path) == before


def test_keep_keeps_the_compressed_file(hub, tmp_path):
    download(["norman19"], tmp_path, keep=True)
    assert data(tmp_path) == {"norman19_processed.h5ad": PLAIN, CELLS: PACKED}


def test_a_file_of_someone_else_is_not_overwritten(hub, tmp_path):
    mine = tmp_path / "norman19_processed.h5ad"
    mine.write_bytes(b"mine")
    said = refusal(["norman19"], tmp_path)
    assert said.startswith(f"{mine}: found a file that perturbench.lock.json does not record")
    assert data(tmp_path) == {"norman19_processed.h5ad": b"mine"}
    assert not hub.of_file(CELLS)
    download(["norman19"], tmp_path, force=True)
    assert data(tmp_path) == {"norman19_processed.h5ad": PLAIN}
    # A recorded file that has changed since is someone's too.
    mine.write_bytes(PLAIN + b"mine")
    assert "does not record as it is" in refusal(["norman19"], tmp_path)
    assert data(tmp_path) == {"norman19_processed.h5ad": PLAIN + b"mine"}


def test_later_downloads_keep_to_the_commit_of_the_first(hub, tmp_path):
    hub.files["sciplex3_processed.h5ad.gz"] = gzip.compress(b"old")
    download(["norman19"], tmp_path)
    hub.commits[SECOND] = {**hub.files, "sciplex3_processed.h5ad.gz": gzip.compress(b"new")}
    hub.main = SECOND
    before = held(tmp_path)
    said = refusal(["sciplex3"], tmp_path, revision="main")
    assert said.startswith(
        f"{tmp_path / 'perturbench.lock.json'}: found commit {FIRST}, expected {SECOND} as 'main' now is"
    )
    assert held(tmp_path) == before
    download(["sciplex3"], tmp_path)
    assert data(tmp_path)["sciplex3_processed.h5ad"] == b"old"
    assert lock(tmp_path)["revision"] == FIRST
    download(["sciplex3"], tmp_path, revision=FIRST)
    download(["sciplex3"], tmp_path / "other")
    assert data(tmp_path / "other") == {"sciplex3_processed.h5ad": b"new"}


def test_an_interrupted_first_download_is_pinned_already(hub, tmp_path):
    hub.cuts[CELLS] = [150_000] * 100
    refusal(["norman19"], tmp_path)
    assert lock(tmp_path) == {"repository": "altoslabs/perturbench", "revision": FIRST, "files": {}}
    hub.commits[SECOND] = {CELLS: gzip.compress(b"new")}
    hub.main, hub.cuts = SECOND, {}
    download(["norman19"], tmp_path)
    assert data(tmp_path) == {"norman19_processed.h5ad": PLAIN}


def test_bytes_of_another_revision_are_not_continued(hub, tmp_path):
    hub.cuts[CELLS] = [150_000] * 100
    refusal(["norman19"], tmp_path)
    (tmp_path / module.LOCK).unlink()
    hub.commits[SECOND] = {CELLS: gzip.compress(PLAIN[::-1])}
    hub.main, hub.cuts = SECOND, {}
    hub.requests.clear()
    download(["norman19"], tmp_path)
    assert [r.range for r in hub.of_file(CELLS)] == [None]
    assert data(tmp_path) == {"norman19_processed.h5ad": PLAIN[::-1]}


def test_a_hub_that_contradicts_the_lock_file_is_refused(hub, tmp_path):
    download(["norman19"], tmp_path)
    hub.files[CELLS] = gzip.compress(b"other content under the same commit")
    before = held(tmp_path)["norman19_processed.h5ad"]
    said = refusal(["norman19"], tmp_path, force=True)
    assert f"expected {hashlib.sha256(PACKED).hexdigest()} as {tmp_path / module.LOCK} has it" in said
    assert data(tmp_path)["norman19_processed.h5ad"] == before


def test_leftovers_of_killed_runs_are_swept(hub, tmp_path):
    (tmp_path / ".norman19_processed.h5ad.4242.part").write_bytes(b"half")
    (tmp_path / f".{CELLS}.0123456789ab.incomplete").write_bytes(b"half")
    (tmp_path / ".sciplex3_processed.h5ad.gz.0123456789ab.incomplete").write_bytes(b"another's")
    download(["norman19"], tmp_path)
    assert set(data(tmp_path)) == {
        "norman19_processed.h5ad",
        ".sciplex3_processed.h5ad.gz.0123456789ab.incomplete",
    }


def test_a_folder_that_a_killed_run_left_half_unpacked_is_not_mixed_in(hub, tmp_path):
    with_splits(hub, tar(GOOD))
    for name in (".mcfaline23_gxe_splits.new", ".mcfaline23_gxe_splits.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "stale.csv").write_bytes(b"stale")
    download(["mcfaline23"], tmp_path)
    assert data(tmp_path) == GOOD | {"mcfaline23_gxe_processed.h5ad": PLAIN}


def test_too_many_bytes_are_thrown_away(hub, tmp_path):
    tag = hashlib.sha256(PACKED).hexdigest()[:12]
    (tmp_path / f".{CELLS}.{tag}.incomplete").write_bytes(PACKED + b"more")
    download(["norman19"], tmp_path)
    assert data(tmp_path) == {"norman19_processed.h5ad": PLAIN}


def test_unknown_names(hub, tmp_path):
    said = refusal(["norman"], tmp_path)
    assert said == (
        "data set 'norman': found no such name, expected one of norman19, sciplex3, frangieh21, jiang24, op3, "
        "mcfaline23 or all; did you mean 'norman19'?"
    )
    assert hub.requests == []
    assert held(tmp_path) == {}


def test_a_file_or_revision_or_repository_that_the_hub_lacks(hub, tmp_path):
    said = refusal(["norman19", "frangieh21"], tmp_path)
    assert said.startswith(f"frangieh21_split.csv: found no such file in altoslabs/perturbench at {hub.endpoint}")
    assert data(tmp_path) == {}
    said = refusal(["norman19"], tmp_path, revision="v9")
    assert said.startswith(f"altoslabs/perturbench: found no revision 'v9' at {hub.endpoint}")
    hub.repository = "someone/else"
    said = refusal(["norman19"], tmp_path / "other")
    assert said.startswith(f"altoslabs/perturbench: found no such data set open to you at {hub.endpoint}")
    assert held(tmp_path / "other") == {}


@pytest.mark.parametrize(("path", "status"), [("/api/datasets", 503), ("/cdn", 403), ("/datasets", 404), ("/cdn", 503)])
def test_a_hub_that_refuses(hub, tmp_path, path, status):
    hub.status[path] = status
    said = refusal(["norman19"], tmp_path)
    assert str(status) in said
    assert hub.endpoint in said
    assert not {name: content for name, content in data(tmp_path).items() if content}
    hub.status.clear()
    download(["norman19"], tmp_path)
    assert data(tmp_path) == {"norman19_processed.h5ad": PLAIN}


@pytest.mark.parametrize(
    ("endpoint", "said"),
    [
        ("http://127.0.0.1:9/", "http://127.0.0.1:9 cannot be reached ("),
        ("127.0.0.1:9", "HF_ENDPOINT: found '127.0.0.1:9', expected an address like https://huggingface.co"),
        ("http://[::1", "HF_ENDPOINT: found 'http://[::1', expected an address"),
    ],
)
def test_a_hub_that_cannot_be_reached(hub, tmp_path, monkeypatch, endpoint, said):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert refusal(["norman19"], tmp_path).startswith(said)
    assert held(tmp_path) == {}


@pytest.mark.parametrize("answer", [b"<html>log in</html>", b"{}", b"[1]", b"null"])
def test_an_answer_that_is_not_the_hubs(hub, tmp_path, answer):
    hub.api_answer = answer
    assert refusal(["norman19"], tmp_path).startswith(f"{hub.endpoint}: found an answer that is not the hub's")
    assert held(tmp_path) == {}


def test_a_disk_without_room_is_told_beforehand(hub, tmp_path, monkeypatch):
    usage = namedtuple("Usage", "free")
    # At its peak the packed and the unpacked file lie there.
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: usage(2 * len(PACKED) - 1))
    said = refusal(["norman19"], tmp_path)
    assert said.startswith(f"{tmp_path}: found 600.2 kB free on the disk, expected 600.2 kB at the least")
    assert not hub.of_file(CELLS)
    assert data(tmp_path) == {}
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: usage(2 * len(PACKED)))
    download(["norman19"], tmp_path)
    assert data(tmp_path) == {"norman19_processed.h5ad": PLAIN}


def full(*arguments) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_fills_while_fetching(hub, tmp_path, monkeypatch):
    write = hub_module._Watched.write

    def write_some(self, content):
        return write(self, content) if self.tell() < 100_000 else full()

    with monkeypatch.context() as patch:
        patch.setattr(hub_module._Watched, "write", write_some)
        said = refusal(["norman19"], tmp_path)
    assert said == (
        f"{tmp_path}: found the disk full, expected room for the data; free some, the same command then continues"
    )
    (kept,) = data(tmp_path).values()
    assert kept == PACKED[: len(kept)]
    assert 100_000 <= len(kept) < 100_000 + CHUNK
    download(["norman19"], tmp_path)
    assert [r.range for r in hub.of_file(CELLS)] == [None, f"bytes={len(kept)}-"]
    assert data(tmp_path) == {"norman19_processed.h5ad": PLAIN}


def test_a_disk_that_fills_while_unpacking_keeps_what_was_fetched(hub, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(unpack.gzip, "open", full)
        assert "found the disk full" in refusal(["norman19"], tmp_path)
    assert list(data(tmp_path).values()) == [PACKED]
    hub.requests.clear()
    download(["norman19"], tmp_path)
    assert hub.of_file(CELLS) == []
    assert data(tmp_path) == {"norman19_processed.h5ad": PLAIN}


def test_a_folder_that_cannot_be_one(hub, tmp_path):
    (tmp_path / "file").write_text("mine")
    said = refusal(["norman19"], tmp_path / "file")
    assert said.startswith(f"{tmp_path / 'file'}: found File exists, expected a folder to write to")
    assert held(tmp_path) == {"file": b"mine"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(hub, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    assert "found Permission denied, expected a folder to write to" in refusal(["norman19"], closed)
    assert held(closed) == {}


def test_two_downloads_into_one_folder(hub, tmp_path):
    with FileLock(tmp_path / module.BUSY):
        said = refusal(["norman19"], tmp_path)
    assert said.startswith(f"{tmp_path}: found another download at work there")
    assert held(tmp_path) == {}
    assert hub.requests == []


@pytest.mark.parametrize("content", ["", "[]", '{"files": {}}', '{"revision": null, "files": 3}'])
def test_a_lock_file_that_is_none(hub, tmp_path, content):
    (tmp_path / module.LOCK).write_text(content)
    assert refusal(["norman19"], tmp_path).startswith(f"{tmp_path / module.LOCK}: found content that is no lock file")
    assert held(tmp_path) == {module.LOCK: content.encode()}


def test_a_token_goes_to_the_hub_and_not_to_its_storage(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    download(["norman19"], tmp_path)
    seen = {r.path.split("/")[1]: r.authorization for r in hub.requests}
    assert seen["api"] == seen["datasets"] == "Bearer hf_secret"
    assert seen["cdn"] is None


def test_bars_are_for_terminals(hub, tmp_path):
    output = io.StringIO()
    download(["norman19"], tmp_path, console=Console(file=output, force_terminal=True, width=120))
    for step in ("fetching", "checking", "unpacking"):
        assert f"{step} {CELLS}" in output.getvalue()


def test_the_hubs_own_bars_and_warnings_stay_away(hub, tmp_path, monkeypatch):
    hub.cuts[CELLS] = [100_000]
    monkeypatch.setenv("TQDM_POSITION", "-1")  # makes huggingface_hub take anything for a terminal
    done = command(tmp_path).communicate(timeout=60)
    assert done == (f"{tmp_path / 'norman19_processed.h5ad'} is there (300.0 kB)\n", "")
    assert len(hub.of_file(CELLS)) == 2
