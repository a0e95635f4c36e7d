"""Passes reuse the memory of the passes before them: page faults are counted, in a process of its own."""

import json
import platform
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only the GNU C library can be asked"),
]

CHILD = f"""
import json, resource, sys, threading
sys.path[:0] = {sys.path!r}
from engine import RecordHook, forward, load, heap
if sys.argv[1] == "as it comes":
    load.keep_freed_memory = lambda: False
model = load.load_model("smollm2-135m-instruct")
ids = list(range(1000, 1128))

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    forward(model, ids, logits_at="none")
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

counts = []
def passes():
    counts.extend(faults() for _ in range(4))
thread = threading.Thread(target=passes)  # as the server runs them
thread.start(), thread.join()
passes()
print(json.dumps(counts))
"""


def faults(how: str) -> list[int]:
    ran = subprocess.run([sys.executable, "-c", CHILD, how], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_the_second_pass_and_those_after_it_need_hardly_a_new_page():
    in_thread, in_main = faults("kept")[2:4], faults("kept")[6:8]
    assert max(in_thread + in_main) < 1000
    assert min(faults("as it comes")[2:4]) > 5000, "what there would be without"


HELD = f"""
import json, os, sys
sys.path[:0] = {sys.path!r}
import numpy as np
from engine import heap

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

heap.keep_freed_memory()
before = resident()
arrays = [np.ones(1 << 18, np.float32) for _ in range(64)]
del arrays
freed = resident()
heap.give_back()
print(json.dumps([freed - before, resident() - before]))
"""


def test_freed_memory_is_kept_until_it_is_given_back():
    ran = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    kept, left = json.loads(ran.stdout)
    assert kept > 48 << 20
    assert left < 8 << 20
