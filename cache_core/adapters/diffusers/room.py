"""How much a cache may hold beside a model on diffusers, which keeps no account of memory."""

import torch

from ...strategy.lane import AWAY_SHARE

SHARE = 0.5  # of what is free before the first call: how much the model itself needs is not known then


def free_on(device: torch.device) -> float | None:
    """Bytes that a cache may take on this device; None where PyTorch does not tell, as on the CPU."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return SHARE * (torch.cuda.mem_get_info(device)[0] + unused)


def free_away(device: torch.device) -> float | None:
    """Bytes that a cache may take in main memory instead of on this device; None where psutil is not installed."""
    if device.type != "cuda":
        return None
    try:
        import psutil
    except ImportError:
        return None
    return AWAY_SHARE * psutil.virtual_memory().available
