"""The command line itself: suggestions, lists that end, help, errors of the disk, interruptions and closed pipes."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from primeflow_perturbench.cli import common, main
from primeflow_perturbench.cli.application import options_first
from primeflow_perturbench.cli.common import Parser, answering
from primeflow_perturbench.errors import InputError


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs ``primeflow`` in this process; returns (exit status, output, errors)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["primeflow", *arguments])
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = stop.code or 0
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return status, printed.out, printed.err

    return run


@pytest.fixture
def parser():
    parser = Parser(prog="primeflow test")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--keys", nargs="*", default=[])
    parser.add_argument("--kind", choices=["narrow", "wide"])
    parser.add_argument("--flag", action="store_true")
    return parser


@pytest.mark.parametrize(
    ("arguments", "suggested"),
    [
        (["trian"], "train"),
        (["data", "chek"], "check"),
        (["data", "check", "--covarate-keys", "a", "x.h5ad"], "--covariate-keys"),
        (["evaluate", "a", "b", "--pipelines", "papper"], "paper"),
        (["share", "x", "--output", "y", "--licence", "z"], "--license"),
        (["sweep", "--dry-rnu"], "--dry-run"),
        (["train", "--cgf", "job"], "--cfg"),
        (["train", "model.gidance=2"], "model.sampler.guidance"),
        (["train", "modle=primeflow"], "model"),
        (["train", "model=primflow"], "primeflow"),
        (["train", "model/netwrk=unet"], "model/network"),
        (["train", "model/network=uent"], "unet"),
        (["train", "experiment=devel/trnsfer"], "devel/transfer"),
        (["train", "data.loader.bach_size=3"], "data.loader.batch_size"),
        (["predict", "ckpt_pth=x"], "ckpt_path"),
        (["predict", "n_cels=3"], "n_cells"),
        (["sweep", "ablatoin=guidance"], "sweep.ablations"),
        (["sweep", "modle=primeflow"], "model"),
        (["sweep", "experiment=quickstar"], "quickstart"),
    ],
    ids=" ".join,
)
def test_a_misspelt_word_names_the_nearest(call, arguments, suggested):
    status, _, errors = call(*arguments)
    assert status == 2
    assert f"did you mean '{suggested}'?" in errors
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "keys", "files"),
    [
        (["--keys", "a", "x"], ["a"], ["x"]),
        (["--keys", "a", "b", "x"], ["a", "b"], ["x"]),
        (["--keys", "a", "x", "--flag"], ["a"], ["x"]),
        (["--keys", "a", "x", "--kind", "wide"], ["a"], ["x"]),
        (["--flag", "--keys", "a", "x"], ["a"], ["x"]),
        (["x", "y", "--keys", "a", "b"], ["a", "b"], ["x", "y"]),
    ],
    ids=" ".join,
)
def test_a_list_leaves_the_last_value_to_a_missing_argument(parser, arguments, keys, files):
    found = parser.parse_args(arguments)
    assert (found.keys, found.files) == (keys, files)


@pytest.mark.parametrize("arguments", [[], ["--keys", "x"], ["--keys"], ["x", "--kind", "width"], ["x", "--flg"]])
def test_an_incomplete_command_line_is_an_error(parser, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("arguments", [[], ["data"]])
def test_a_bare_command_shows_its_help(call, arguments):
    status, output, errors = call(*arguments)
    assert (status, errors) == (0, "")
    assert "usage: primeflow" in output


@pytest.mark.parametrize(
    "arguments",
    [
        ["--cfg", "job", "seed=7", "model=primeflow_small"],
        ["seed=7", "--cfg", "job", "model=primeflow_small"],
        ["seed=7", "model=primeflow_small", "-c", "job"],
        ["seed=7", "--cfg=job", "model=primeflow_small"],
    ],
)
def test_options_of_hydra_and_overrides_come_in_any_order(call, arguments):
    status, output, _ = call("train", *arguments)
    assert status == 0
    assert "\nseed: 7\n" in output


def test_options_first_keeps_values_of_options(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert options_first(["a=1", "--cfg", "job", "b=2"]) == ["--cfg", "job", "a=1", "b=2"]


@pytest.mark.parametrize(
    "override", ["foo", "seed=[1", "data.data.filename=e=1.h5ad", "=", "data.data.filename=~/x", ""]
)
def test_an_override_that_cannot_be_read_is_an_error(call, override):
    status, _, errors = call("train", override)
    assert status == 2
    assert "KEY=VALUE" in errors


# --- how commands end


def ending(error, capsys):
    """Exit status and message of work that raises an error."""

    def work():
        raise error

    with pytest.raises(SystemExit) as stop:
        answering(work)
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left", "out/x"), "out/x: no space left on device; free some space"),
        (PermissionError(errno.EACCES, "denied", "out"), "out: permission denied; change its permissions"),
        (NotADirectoryError(errno.ENOTDIR, "no", "f/o"), "f/o: not a directory; a part of the path is a file"),
        (RuntimeError("unable to close file, errno = 28, error message = ..."), "no space left on device"),
        (OSError("Can't write data (file write failed: errno = 27, x)"), "file too large"),
        (RuntimeError("PytorchStreamWriter failed writing file data/3"), "no space left on device"),
        (MemoryError("Unable to allocate 8 TiB"), "the memory does not suffice (Unable to allocate 8 TiB)"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), "the memory does not suffice"),
        (InputError("x [a] is wrong"), "error: x [a] is wrong"),
    ],
)
def test_errors_of_the_machine_are_one_sentence(error, expected, capsys):
    status, message = ending(error, capsys)
    assert status == 2
    assert expected in message


def test_an_error_of_the_disk_is_found_behind_another(capsys):
    error = KeyError("x")
    error.__context__ = OSError(errno.ENOSPC, "No space left", "out/x")
    assert "no space left" in ending(error, capsys)[1]


def test_a_bug_leaves_its_traceback_in_a_file(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(common.tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("PRIMEFLOW_DEBUG", raising=False)
    status, message = ending(IndexError("no such row"), capsys)
    (file,) = tmp_path.iterdir()
    assert status == 1
    assert "IndexError: no such row" in message
    assert str(file) in message
    assert "Traceback" in file.read_text()
    monkeypatch.setenv("PRIMEFLOW_DEBUG", "1")
    with pytest.raises(IndexError):
        ending(IndexError("no such row"), capsys)


def test_an_interruption_is_one_line_and_status_130(capsys):
    assert ending(KeyboardInterrupt(), capsys) == (130, "Interrupted.\n")


@pytest.mark.parametrize("arguments", [["train", "--help"], ["--help"], ["data", "check", "--help"]])
def test_a_reader_that_ends_early_causes_no_message(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "primeflow_perturbench", *arguments], stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode in (0, 1)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_command_and_removes_its_temporary_file(number, status, tmp_path):
    code = (
        "import sys, time; from pathlib import Path; sys.argv = ['primeflow', 'share', 'x', '--output', 'y']\n"
        "from primeflow_perturbench import cli; from primeflow_perturbench.cli import share\n"
        "from primeflow_perturbench.files import replacing\n"
        "def wait():\n"
        "    with replacing('result') as part:\n"
        "        part.write_text('half'); print('ready', flush=True); time.sleep(30)\n"
        "share.main = wait\n"
        "cli.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == status
    assert errors == ("Interrupted.\n" if number == signal.SIGINT else "")
    assert list(tmp_path.iterdir()) == []
