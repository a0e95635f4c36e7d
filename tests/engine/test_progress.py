"""What a load says by itself: lines on stderr, a bar in a terminal, nothing where somebody follows or wants silence."""

import os
import subprocess
import sys

import pytest
from tiny_files import hf_directory

from engine import load_model, progress

pty = pytest.importorskip("pty")

LOAD = f"import sys; sys.path[:0] = {sys.path!r}; from engine import load_model; load_model('synthetic')"


@pytest.mark.real
def test_a_load_that_takes_long_has_a_line_for_each_part(monkeypatch, capsys):
    monkeypatch.setattr(progress, "QUIET", 0)
    load_model("smollm2-135m-instruct", converted=False, weights="bf16")
    lines = capsys.readouterr().err.splitlines()
    told = [f"loading smollm2-135m-instruct: {part}" for part in ("reading layers", "rounding layers")]
    assert lines[:2] == told


def test_a_download_says_so_once(monkeypatch, capsys):
    monkeypatch.setattr(progress, "QUIET", 0)
    with progress.following("loading small", None, None) as told:
        for done in range(3):
            told.progress(done, 3, "downloading small")
    assert capsys.readouterr().err == "loading small: downloading small\n"


def test_a_short_load_says_nothing_but_what_is_known_to_take_long(monkeypatch, capsys):
    monkeypatch.setattr(progress, "QUIET", float("inf"))
    load_model("synthetic")
    with progress.following("loading small", None, None) as told:
        told.tick(1, 2, "reading layer 0")
        told.say("compiling kernels")
    assert capsys.readouterr().err == "loading small: compiling kernels\n"


@pytest.mark.parametrize("given", [{"progress": False}, {"tick": lambda *_: None}, {"progress": lambda *_: None}])
def test_who_follows_or_wants_silence_sees_no_line(monkeypatch, capsys, tmp_path, given):
    monkeypatch.setattr(progress, "QUIET", 0)
    model = hf_directory(tmp_path / "tiny")
    load_model(model, **given)
    assert capsys.readouterr().err == ""
    load_model(model)
    assert capsys.readouterr().err.startswith(f"loading {model}: reading layers\n")


def test_a_terminal_shows_a_bar_and_is_left_clean():
    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", LOAD], stderr=theirs, env=os.environ | {"TERM": "xterm"}) as child:
        os.close(theirs)
        shown = b""
        while part := _read(ours):
            shown += part
    os.close(ours)
    assert child.returncode == 0
    assert b"loading synthetic" in shown
    assert shown.rstrip().endswith(b"\x1b[2K"), "the bar's line is erased"


def _read(terminal):
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # how Linux says that the other end is closed
        return b""
