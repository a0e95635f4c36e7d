"""llama.cpp on the GGUF file. Its products round activations to 8 bits."""

import os
from ctypes import Array, c_float
from typing import Any

from _serve import Request, serve
from llama_cpp import Llama, llama_get_logits


def load(path: str) -> Any:
    threads = int(os.environ["OMP_NUM_THREADS"])
    return Llama(path, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)


def steps(model: Any, r: Request) -> list[float]:
    model.reset()
    model.eval(r["ids"])
    for token in r["next"]:
        model.eval([token])
        logits: Array[c_float] = llama_get_logits(model.ctx)
    return logits[:8]


if __name__ == "__main__":
    serve(load, {"steps": steps})
