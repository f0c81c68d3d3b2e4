"""Whether what a site gives is fetched from main memory faster than it is computed again."""

from collections.abc import Sequence
from statistics import mean

from torch import Tensor

from ..model import attention_work, tokens_in
from ..strategy import AttentionKind

# Floating-point operations that a GPU may do while one byte goes over its bus: above what an H100 (990 TFLOPS in 16 bit
# by its data sheet, 55 GB/s), an RTX 4090 on an old board (165, 13) or an RTX 5090 (420 in 8 bit, 50) reach.
OPERATIONS_PER_BYTE = 20_000


def is_fetched_faster(moved: int, work: float) -> bool:
    """Whether to copy so many bytes takes less time than so many floating-point operations, one after the other.

    That is: to put one value into main memory, and to fetch all that is kept.
    """
    return moved * OPERATIONS_PER_BYTE < work


def work_of(features: Sequence[Tensor], kind: AttentionKind | None, parameters: int) -> float:
    """About how many floating-point operations give these features, (..., tokens, channels), where none were counted.

    Each parameter counts twice for each token, where there are several streams for those of one. What attention to the
    text does for its few keys is left out, and all attention inside a block.
    """
    tokens = mean(tensor.numel() / max(tensor.shape[-1], 1) for tensor in features)
    keys = 0 if kind in (None, "cross") else sum(map(tokens_in, features))
    return 2.0 * parameters * tokens + attention_work(features, keys)
