"""Models and prompts that many tests share.

model       each of the models in turn: `synthetic` (4 layers, one token per byte), SmolLM2-135M-Instruct, whose
            tests carry the marker `real`, and a tiny model of every family
ids, donor  two prompts of one length that end in the same token, as ids of `model`
"""

import atexit
import os
import shutil
import tempfile

if "PYTEST_XDIST_WORKER" in os.environ:  # before numpy is imported: the workers share the cores already
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ["MECHSCOPE_FAST"] = "no"  # numpy is the reference; tests/engine/test_kernels.py has the kernels
os.environ["MECHSCOPE_WORKSPACE"] = tempfile.mkdtemp(prefix="mechscope-tests-")  # of the servers that tests start

import families
import pytest

import engine

atexit.register(shutil.rmtree, os.environ["MECHSCOPE_WORKSPACE"], ignore_errors=True)

REAL = "smollm2-135m-instruct"
PROMPT, DONOR = "The capital of France is", "Our capital of Greece is"


@pytest.fixture(scope="session")
def synthetic() -> engine.Model:
    return engine.load_model("synthetic")


@pytest.fixture(scope="session")
def smollm2() -> engine.Model:
    return engine.load_model(REAL, converted=False)  # what mutants of the loaders change is in it


@pytest.fixture(scope="session", params=["synthetic", pytest.param("smollm2", marks=pytest.mark.real), *families.ROWS])
def model(request: pytest.FixtureRequest) -> engine.Model:
    if request.param in families.ROWS:
        return families.tiny(request.param)
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def ids(model: engine.Model) -> list[int]:
    return list(model.encode(PROMPT))


@pytest.fixture(scope="session")
def donor(model: engine.Model, ids: list[int]) -> list[int]:
    tokens = list(model.encode(DONOR))
    assert len(tokens) == len(ids)
    assert tokens[-1] == ids[-1]
    return tokens
