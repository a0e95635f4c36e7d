"""Whether the compiled kernels of the `fast` extra are in use: `prepare`, `switch_off`, `kernels`, `using`, `state`.

They are used when numba is installed and MECHSCOPE_FAST is not "no", from the first `prepare` on, which `load_model`
calls. Compiling takes half a minute once per machine and version, whatever the environment; reading what was compiled,
a second per process.
"""

import atexit
import hashlib
import os
import shlex
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any

import numpy as np

from engine.blas import library, want_single_threaded
from engine.matrices import panelled

VARIABLE = "MECHSCOPE_FAST"
SPINS = "20000"
"""How long a thread without work spins before it sleeps (GNU OpenMP). By default it is milliseconds: when
another program wants the processors, decoding becomes ten times slower than without kernels.
"""

_preparing = Lock()
_kernels: ModuleType | None = None
_off = ""
_why_not = "not asked for yet"


def kernels() -> ModuleType | None:
    """`engine.kernels` while it is in use."""
    return _kernels


def state() -> str:
    """What `prepare` came to: "in use", or why not."""
    return "in use" if _kernels is not None else _why_not


def switch_off(why: str) -> None:
    """Let later calls of `prepare` do nothing."""
    global _off
    _off = why


def prepare(say: Callable[[str], None] | None = None) -> None:
    """Use the kernels from now on, if they are installed and wanted. `say` hears of it before half a minute's wait."""
    with _preparing:
        _prepare(say)


def _prepare(say: Callable[[str], None] | None) -> None:
    global _why_not
    if _kernels is not None:
        return
    if _off:
        _why_not = _off
    elif os.environ.get(VARIABLE, "yes").lower() in ("no", "0", "false", "off", "n", "f"):
        _why_not = f"switched off by {VARIABLE}"
    elif find_spec("numba") is None:
        _why_not = f"not installed; {_how_to_install()}"
    else:
        try:
            compiled = _compiled(say)
            _check(compiled)
            _use(compiled)
        except Exception as error:  # numba and LLVM raise many; numpy can do everything
            reason = str(error).partition("\n")[0] or type(error).__name__
            _why_not = f"cannot be compiled here: {reason}; the next process tries again"
            switch_off(_why_not)  # each load would wait as long
            warnings.warn(f"compiled kernels are not used: {_why_not}", stacklevel=2)


def _how_to_install() -> str:
    import sysconfig

    if not os.access(sysconfig.get_path("purelib"), os.W_OK):
        return "this environment cannot be written: make one with the fast extra, or add numba where it is made"
    return f"into this environment: {shlex.quote(sys.executable)} -m pip install numba"


@contextmanager
def using(wanted: bool) -> Iterator[None]:
    """Compute with the kernels, or with numpy alone, for a `with` block and in all threads: to compare."""
    kept = _kernels
    _use(_compiled() if wanted else None)
    try:
        yield
    finally:
        _use(kept)


def _use(kernels: ModuleType | None) -> None:
    """The kernels have threads of their own: numpy's BLAS has one meanwhile, in the whole process."""
    global _kernels
    if (change := (kernels is not None) - (_kernels is not None)) != 0:
        want_single_threaded(change)
    _kernels = kernels


def _check(kernels: ModuleType) -> None:
    """Raise unless a small product comes out right: what numba is told by its environment may break it at first use."""
    made = kernels.product(np.ones((2, 3), np.float32), panelled(np.ones((3, 5), np.float32), kernels.WIDTH), 2)
    if made is None or not (made == 3).all():
        raise RuntimeError("a product comes out wrong")


def _after_fork() -> None:
    """GNU OpenMP ends a forked process that calls kernels: numpy does everything there, with threads of its own."""
    global _kernels, _preparing, _why_not
    _preparing = Lock()
    if _kernels is not None:
        _kernels = None
        switch_off("not used in a forked process")
        _why_not = _off


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)


def _compiled(say: Callable[[str], None] | None = None) -> ModuleType:
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    import numba

    settings: Any = numba.config
    kept = settings.CACHE_DIR, settings.CACHE_LOCATOR_CLASSES
    folder = _folder(kept[0])
    if say is not None and not any(folder.iterdir()):
        say("compiling kernels, once per machine and version (half a minute)")
    settings.CACHE_DIR, settings.CACHE_LOCATOR_CLASSES = str(folder), "engine.kernel_cache.KernelFolder"
    try:
        from engine import kernels
    finally:
        settings.CACHE_DIR, settings.CACHE_LOCATOR_CLASSES = kept
    return kernels


def _folder(asked: str) -> Path:
    """Of compiled kernels: below numba's own setting or the cache directory. Where that cannot be written, one that
    ends with the process.
    """
    from platformdirs import user_cache_path

    folder = Path(asked or user_cache_path("mechscope") / "kernels") / _sources()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        passing = Path(tempfile.mkdtemp(prefix="mechscope-kernels-"))
        atexit.register(shutil.rmtree, passing, ignore_errors=True)
        return passing


def _sources() -> str:
    """A digest of what kernels are compiled from, and with: the same in every environment of a machine. The processor
    is in numba's own keys.
    """
    from importlib.metadata import version

    found, engine = library(), Path(__file__).parent
    digest = hashlib.sha256(b"" if found is None else bytes([found.bits]))
    digest.update(repr((sys.version_info[:3], version("numba"), version("llvmlite"))).encode())
    for path in (engine / "activations.py", *sorted((engine / "kernels").glob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
