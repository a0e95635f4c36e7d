"""Starting costs what is imported: a command loads what it needs and no more. Modules are counted, not seconds."""

import json
import subprocess
import sys

import pytest
import tiny_files

ENGINE_ALONE = 112
"""Modules beyond numpy's: the engine's own fifty and parts of the standard library."""


def loaded(first: str, then: str) -> set[str]:
    """The modules that `then` loads in a process where `first` has run."""
    script = f"""
import json, sys
sys.path[:0] = {sys.path!r}
{first}
before = set(sys.modules)
{then}
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(ran.stdout.splitlines()[-1]))


def packages(modules: set[str]) -> set[str]:
    return {name.split(".")[0] for name in modules}


def test_the_engine_imports_numpy_and_nothing_heavy():
    modules = loaded("import numpy", "import engine")
    assert "engine.decoder" in modules
    assert packages(modules) & {"tokenizers", "gguf", "safetensors", "huggingface_hub", "filelock", "numba"} == set()
    assert len(modules) <= ENGINE_ALONE, sorted(modules)


@pytest.mark.parametrize("write", [tiny_files.hf_directory, tiny_files.gguf_file])
def test_a_mapped_model_brings_no_reader_of_files_with_it(write, tmp_path):
    path = write(tmp_path / "tiny.gguf")
    first = f"""
from pathlib import Path
from engine import converted, load
load.LEAST, converted.directory = 0, lambda: Path({str(tmp_path / "converted")!r})
"""
    use = f"assert load.load_model({str(path)!r}).capture_residuals([1, 2], [1])"
    reading, mapping = loaded(first, use), loaded(first, use)
    assert packages(reading) & {"gguf", "safetensors"}
    assert {name for name in packages(mapping) if name != "engine"} == set()
    words = loaded(first, f"load.load_model({str(path)!r}).encode('the')")
    assert "tokenizers" in packages(words), "when words are asked for, and not before"


@pytest.mark.parametrize("command", ["--help", "serve --help", "fetch --help"])
def test_the_command_line_imports_neither_the_engine_nor_the_protocol_before_it_must(command):
    run = f"""
from contextlib import redirect_stdout
from io import StringIO
from server.__main__ import app
with redirect_stdout(StringIO()):
    app({command.split()!r}, standalone_mode=False)
"""
    modules = loaded("", run)
    assert "typer" in packages(modules)
    assert packages(modules) & {"engine", "numpy", "mcp", "uvicorn", "starlette", "limits", "tokenizers"} == set()


def test_the_server_reads_no_model_format_before_a_model_is_loaded():
    modules = loaded("", "import server.serve")
    assert packages(modules) & {"gguf", "tokenizers", "huggingface_hub"} == set()
