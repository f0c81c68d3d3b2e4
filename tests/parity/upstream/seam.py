"""A plugin of pytest (`-p seam`): diffusers' own cache tests, with the caching that CACHING names.

CACHING=diffusers leaves everything as it is. CACHING=refrain puts `apply` in place of diffusers' four `apply_*`, which
`CacheMixin.enable_cache` looks up when it is called. diffusers is imported here, before the checkout with the tests can
put its own source first: what is tested is what is installed.
"""

import gc
import os
import sys

import diffusers.hooks
import torch

REPLACED = (
    "apply_pyramid_attention_broadcast",
    "apply_faster_cache",
    "apply_first_block_cache",
    "apply_taylorseer_cache",
)

if os.environ["CACHING"] == "refrain":
    from cache_core.adapters.diffusers import apply

    for name in REPLACED:
        setattr(diffusers.hooks, name, apply)

sys.path.insert(0, os.environ["DIFFUSERS_CHECKOUT"])  # its package `tests`


def pytest_configure(config):
    config.addinivalue_line("markers", "cache: diffusers' mark of these tests")


def pytest_report_header():
    return f"diffusers {diffusers.__version__} in {diffusers.__path__[0]}, caching by {os.environ['CACHING']}"


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # upstream collects garbage twice a test


def pytest_runtest_setup():
    torch.set_num_threads(1)
    torch.manual_seed(0)  # upstream's models have random weights
