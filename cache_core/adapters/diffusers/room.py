"""How much a cache may hold beside a model on diffusers, which keeps no account of memory."""

import torch

from ...strategy.lane import AWAY_SHARE

SHARE = 0.5  # of what is free before the first call: how much the model itself needs is not known then


def free_on(device: torch.device) -> float | None:
    """Bytes that a cache may take on this device; None where PyTorch does not tell, as on the CPU.

    PyTorch has the same functions for CUDA (and ROCm), XPU and what other vendors add, and its own for Metal, where the
    device shares main memory with all other programs. What PyTorch has taken and does not use is free.
    """
    module = getattr(torch, device.type, None)
    try:
        if device.type == "mps":
            taken, used = module.driver_allocated_memory(), module.current_allocated_memory()
            available = _available_main_memory()
            left = module.recommended_max_memory() - taken
            return SHARE * ((left if available is None else min(left, available)) + taken - used)
        if not hasattr(module, "mem_get_info"):
            return None
        unused = module.memory_reserved(device) - module.memory_allocated(device)
        return SHARE * (module.mem_get_info(device)[0] + unused)
    except RuntimeError:  # some drivers of XPU do not say what is free
        return None


def free_away(device: torch.device) -> float | None:
    """Bytes that a cache may take in main memory instead of on this device; None where nobody knows, or none should.

    Only on CUDA: elsewhere copies are made at once and through no pinned memory (`strategy/lane.py`), which is too slow
    to go unasked, and a device of Metal has no memory but that. `cache_device="cpu"` asks for it on any device.
    """
    available = _available_main_memory() if device.type == "cuda" else None
    return None if available is None else AWAY_SHARE * available


def _available_main_memory() -> int | None:
    """Bytes that programs may still take; None where psutil is not installed."""
    try:
        import psutil
    except ImportError:
        return None
    return psutil.virtual_memory().available
