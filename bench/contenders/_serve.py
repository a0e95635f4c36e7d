"""The loop of a contender's process: read a piece of work as a line of JSON, do it, answer with its time and results.

A contender gives `serve` a function that loads the model, and {work: function(model, request) -> results}. Results are
numbers that every contender must agree on.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

Request = dict[str, Any]
Work = Callable[[Any, Request], list[float]]


def serve(load: Callable[[str], Any], works: dict[str, Work]) -> None:
    began = time.perf_counter()
    model = load(sys.argv[1])
    _answer({"loaded": time.perf_counter() - began})
    for line in sys.stdin:
        request = json.loads(line)
        began = time.perf_counter()
        results = works[request["work"]](model, request)
        seconds = time.perf_counter() - began
        _answer({"seconds": seconds, "results": [float(x) for x in results]})


def _answer(answer: dict[str, Any]) -> None:
    sys.stdout.write("ANSWER " + json.dumps(answer) + "\n")
    sys.stdout.flush()
