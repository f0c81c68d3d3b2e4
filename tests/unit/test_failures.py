"""Failures while a model's blocks are learned: what is theirs to handle goes on, what is ours computes."""

import pytest
import torch
from toy import POSITIVE, Sampling, Toy, first_latent

from cache_core.model.failures import is_of_the_device, is_out_of_memory
from cache_core.model.rehearsal import NO_MEMORY, NO_NUMBER, SHAPES_CHANGE
from cache_core.strategies.first_block import FirstBlockCache

NO_MEMORY_LEFT = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.00 GB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"),
]
ACCELERATOR_ERROR = getattr(torch, "AcceleratorError", None)


@pytest.mark.parametrize("error", NO_MEMORY_LEFT, ids=lambda error: str(error)[:20])
def test_memory_that_ran_out_is_known_on_every_device(error):
    assert is_out_of_memory(error) and is_of_the_device(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), KeyError("out of memory")]
)
def test_other_errors_are_not_taken_for_it(error):
    assert not is_out_of_memory(error) and not is_of_the_device(error)


def failing_in_the_rehearsal(toy, error):
    """A sampling whose second forward pass, the rehearsal, fails behind the blocks."""
    sampling, passes = Sampling(toy, (FirstBlockCache(),), branches=(POSITIVE,)), []

    def fail(*_):
        passes.append(1)
        if len(passes) == 2:
            raise error

    toy.head.register_forward_pre_hook(fail)
    return sampling


@pytest.mark.parametrize("error", NO_MEMORY_LEFT, ids=lambda error: str(error)[:20])
def test_memory_that_runs_out_in_the_rehearsal_computes_and_says_so(toy, error):
    sampling = failing_in_the_rehearsal(toy, error)
    outputs = [sampling.call_on(first_latent(), index) for index in range(4)]
    uncached = Sampling(Toy(), (), branches=(POSITIVE,))
    assert all(torch.equal(output, uncached.call_on(first_latent(), index)) for index, output in enumerate(outputs))
    assert sampling.report.count("computed") == 4
    assert any(NO_MEMORY in note for note in sampling.report.notes)


@pytest.mark.skipif(ACCELERATOR_ERROR is None, reason="this torch has no AcceleratorError")
@pytest.mark.parametrize("words", ["CUDA error: an illegal memory access was encountered", "CUDA error: out of memory"])
def test_a_failure_of_the_device_in_the_rehearsal_is_raised(toy, words):
    sampling = failing_in_the_rehearsal(toy, ACCELERATOR_ERROR(words))
    with pytest.raises(ACCELERATOR_ERROR, match=words):
        sampling.call_on(first_latent(), 0)


class Interrupted(Exception):
    """As ComfyUI's was in 0.8: an ordinary exception."""


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, Interrupted])
def test_an_interruption_of_the_rehearsal_is_raised(toy, interruption):
    sampling = failing_in_the_rehearsal(toy, interruption())
    with pytest.raises(interruption):
        sampling.call_on(first_latent(), 0)


def test_shapes_that_do_not_fit_in_the_rehearsal_are_tried_again(toy):
    sampling = failing_in_the_rehearsal(toy, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    for index in range(4):
        sampling.call_on(first_latent() * (1 - index / 100), index)
    assert sampling.report.count("forecast", "reused") >= 1
    assert not any(SHAPES_CHANGE in note for note in sampling.report.notes)


def test_an_output_that_is_no_number_is_computed_and_named(toy):
    toy.head.bias.data.fill_(float("nan"))
    sampling = Sampling(toy, (FirstBlockCache(),), branches=(POSITIVE,))
    for index in range(6):
        assert sampling.call_on(first_latent(), index).isnan().all()
    assert sampling.report.count("computed") == 6
    assert any(NO_NUMBER in note for note in sampling.report.notes)
