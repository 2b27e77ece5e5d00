"""What Pallas kernels compute in matrix products, which a compiled program does not say.

A kernel is one instruction of the program, and its body is not HLO. The attention kernel's caller writes the pairs of a query and
a key that one head computes into the instruction's scope (`layers.dot_product`); a pair takes so many products over the width of a
head. The scan kernel of S5 has no matrix products.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

from t5x_ssm.layers.dot_product import PAIRS_SCOPE

TARGET = 'custom_call_target="tpu_custom_call"'
# Forward q·k and p·v; for the gradient of q also q·k, dp and dq; for those of k and v q·k, dp, dk and dv.
PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


def flops(attributes: str, arrays: Sequence[Any]) -> float:
    """FLOPs of an attention kernel; 0 for any other instruction.

    Args:
      attributes: of the instruction.
      arrays: its operands, with `type` and `dims`; the first of floating point is q, [.., L, D].
    """
    pairs = re.search(rf"{PAIRS_SCOPE}(\d+)", attributes)
    kernel = re.search(rf"splash_m[qh]a_({'|'.join(PRODUCTS)})", attributes)
    if TARGET not in attributes or not pairs or not kernel:
        return 0.0
    q = next(array for array in arrays if "f" in array.type)
    return 2.0 * PRODUCTS[kernel[1]] * int(pairs[1]) * math.prod(q.dims[:-2]) * q.dims[-1]
