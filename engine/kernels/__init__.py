"""Compiled kernels: the `fast` extra (numba). `engine.fast` imports this and hands it to `engine.ops`.

product         rows times a matrix
inner           rows times the rows of a matrix
attend          causal attention
activated       SiLU and GELU, times the other branch of a gate
softcap         cap * tanh(x / cap)
softmax         over the last axis
rms_norm        over the last axis
rotate          rotary embedding

Each computes in float32 what `ops` does with numpy, whose `linear` asks for `product`; how near they come is told in
tests/engine/test_kernels.py. They return None, or False if they work in place, for arrays that numpy must do.
Importing compiles them, or takes them from numba's cache. While they are in use the BLAS has one thread
(`engine.fast`): its own threads spin long after a product, on the processors that the kernels need. What kernels need
of it they call on threads of theirs: `library`.
"""

from engine.kernels.attention import attend
from engine.kernels.elementwise import activated, rms_norm, rotate, softcap, softmax
from engine.kernels.products import TOGETHER, inner, product
from engine.kernels.tile import ROWS, WIDTH

__all__ = [
    "ROWS",
    "TOGETHER",
    "WIDTH",
    "activated",
    "attend",
    "inner",
    "product",
    "rms_norm",
    "rotate",
    "softcap",
    "softmax",
]
