"""What all unit tests share: one thread, and a fresh toy model for each test."""

import gc
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads would starve the working one

import pytest
import torch
from toy import Toy


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)  # the same sums in the same order on every machine
    gc.freeze()  # collecting garbage then looks at what the tests make, not at all of torch


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def toy():
    return Toy()
