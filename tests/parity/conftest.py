"""The proof that strict_parity is diffusers 0.42.1 to the last bit. Skipped where another version is installed."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads would starve the working one

import gc

import pytest
import torch


def pytest_configure(config):
    for message in ("In CPU autocast", "torch.meshgrid", "`FluxPosEmbed` is deprecated"):  # diffusers' own
        config.addinivalue_line("filterwarnings", f"ignore:{message}")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)  # the same sums in the same order on every machine
    gc.freeze()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield
