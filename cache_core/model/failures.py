"""What an exception means that was raised in a model, or in what only tells of a run."""

from __future__ import annotations

import torch

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "_status_alloc_failed")  # in messages of a RuntimeError
_OF_THE_DEVICE = getattr(torch, "AcceleratorError", ())  # torch before 2.8 has none, and raises a RuntimeError


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the request that raised this found no memory; what is asked next may find some."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    is_plain = isinstance(error, RuntimeError) and not isinstance(error, _OF_THE_DEVICE)
    return is_plain and any(words in str(error).lower() for words in _OUT_OF_MEMORY)


def give_back(device: torch.device) -> None:
    """Let the device have the memory that PyTorch keeps there for later."""
    backend = getattr(torch, device.type, None)
    if hasattr(backend, "empty_cache"):
        backend.empty_cache()


def is_of_the_device(error: BaseException) -> bool:
    """Whether memory ran out or the device itself failed, then perhaps in something it was asked long before."""
    if isinstance(error, _OF_THE_DEVICE) or is_out_of_memory(error):
        return True
    is_plain_failure = isinstance(error, RuntimeError) and str(error).startswith(("CUDA error: ", "HIP error: "))
    return is_plain_failure and "BLAS_STATUS" not in str(error)  # that is a product of sizes it does not take
