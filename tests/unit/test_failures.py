"""Failures while a model's blocks are learned: what is theirs to handle goes on, what is ours computes."""

import pytest
import torch
from toy import POSITIVE, Sampling, Toy, first_latent, relative_error

from cache_core.model.failures import is_of_the_device, is_out_of_memory
from cache_core.model.rehearsal import NO_NUMBER, SHAPES_CHANGE
from cache_core.run.memory import bytes_held
from cache_core.run.run import CacheRun
from cache_core.run.telling import NOT_TOLD
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategy import Schedule

NO_MEMORY_LEFT = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.00 GB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError("Unable to allocate 9. GiB for an array with shape (9,)"),
]
ACCELERATOR_ERROR = getattr(torch, "AcceleratorError", None)


@pytest.mark.parametrize("error", NO_MEMORY_LEFT, ids=lambda error: str(error)[:20])
def test_memory_that_ran_out_is_known_on_every_device(error):
    assert is_out_of_memory(error) and is_of_the_device(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasGemmEx`"),
        KeyError("out of memory"),
    ],
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
    assert ["memory ran out" in note for note in sampling.report.notes] == [True]


@pytest.mark.skipif(ACCELERATOR_ERROR is None, reason="this torch has no AcceleratorError")
@pytest.mark.parametrize("words", ["CUDA error: an illegal memory access was encountered", "CUDA error: out of memory"])
def test_a_failure_of_the_device_in_the_rehearsal_is_raised(toy, words):
    sampling = failing_in_the_rehearsal(toy, ACCELERATOR_ERROR(words))
    with pytest.raises(ACCELERATOR_ERROR, match=words):
        sampling.call_on(first_latent(), 0)


class Interrupted(Exception):
    """As ComfyUI's was in 0.8: an ordinary exception."""


def with_cancels(sampling, *cancels):
    """The same sampling, driven by something that ends runs by these exceptions."""
    sampling.run = CacheRun(sampling.strategies, Schedule(sampling.sigmas), cancels=cancels)
    return sampling


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, Interrupted])
def test_an_interruption_of_the_rehearsal_is_raised(toy, interruption):
    sampling = with_cancels(failing_in_the_rehearsal(toy, interruption()), Interrupted)
    with pytest.raises(interruption):
        sampling.call_on(first_latent(), 0)


class OfAnotherLibrary(Exception):
    """Raised by einops, Triton, a node of another pack, ..."""


MISREAD = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    AssertionError(),
    AttributeError("'NoneType' object has no attribute 'shape'"),
    UnboundLocalError("local variable 'e0' referenced before assignment"),
    ZeroDivisionError("integer modulo by zero"),
    OfAnotherLibrary("no such kernel"),
]


@pytest.mark.parametrize("error", MISREAD, ids=lambda error: type(error).__name__)
def test_what_a_misread_plan_makes_a_model_raise_is_tried_again(toy, error):
    sampling = failing_in_the_rehearsal(toy, error)
    for index in range(4):
        latent = first_latent() * (1 - index / 100)
        output = sampling.call_on(latent, index)
        exact = Sampling(Toy(), None, branches=(POSITIVE,)).call_on(latent, index)
        assert relative_error(output, exact) < 0.05
    assert sampling.report.count("forecast", "reused") >= 1
    assert not any(SHAPES_CHANGE in note for note in sampling.report.notes)


@pytest.mark.parametrize("change", [lambda out: (out, out), lambda out: out[:, :3], lambda out: out.to("meta")])
def test_an_output_of_another_kind_in_the_rehearsal_is_tried_again(toy, change):
    sampling, passes = Sampling(toy, (FirstBlockCache(),), branches=(POSITIVE,)), []

    def changed(_, __, output):
        passes.append(1)
        return change(output) if len(passes) == 2 else output

    toy.head.register_forward_hook(changed)
    for index in range(4):
        sampling.call_on(first_latent() * (1 - index / 100), index)
    assert sampling.report.count("forecast", "reused") >= 1


OPAQUE = {
    "without a storage": lambda tensor: tensor.to_mkldnn(),  # as all are on DirectML
    "sparse": lambda tensor: tensor.to_sparse(),
    "without a place": lambda tensor: tensor.to("meta"),
}


@pytest.mark.parametrize("kind", OPAQUE)
def test_the_bytes_of_opaque_tensors_are_those_of_their_elements(kind):
    tensors = [OPAQUE[kind](torch.ones(4, 8)) for _ in range(2)]
    assert bytes_held({"some": tensors, "again": tensors[0]}) == 2 * 4 * 8 * 4


def failing_when_told(error, every_time=True):
    """A sampling run of one branch in which what is told of a model call raises."""
    sampling = Sampling(Toy(), (FirstBlockCache(residual_diff_threshold=1.0),), branches=(POSITIVE,))
    told = []

    def fail():
        told.append(1)
        if every_time or len(told) == 2:
            raise error

    sampling.run.report.on_call = fail
    return sampling


@pytest.mark.parametrize(
    "error", [*MISREAD, *NO_MEMORY_LEFT], ids=lambda error: f"{type(error).__name__}: {error}"[:40]
)
def test_an_error_in_telling_changes_nothing_and_is_noted_once(error, caplog):
    sampling = failing_when_told(error)
    outputs = [sampling.call_on(first_latent() * (1 - index / 100), index) for index in range(6)]
    told = Sampling(Toy(), sampling.strategies, branches=(POSITIVE,))
    undisturbed = [told.call_on(first_latent() * (1 - index / 100), index) for index in range(6)]
    assert all(map(torch.equal, outputs, undisturbed))
    assert [call.action for call in sampling.report.calls] == [call.action for call in told.report.calls]
    assert sampling.report.count("forecast", "reused") >= 2 and sampling.report.bytes_held > 0
    assert sampling.report.notes == [f"{NOT_TOLD}{type(error).__name__}: {error}"]
    assert len([record for record in caplog.records if record.exc_info]) == 1


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, Interrupted])
def test_an_interruption_by_who_is_told_is_raised(interruption):
    sampling = failing_when_told(interruption(), every_time=False)
    told = sampling.run.report.on_call
    with_cancels(sampling, Interrupted).run.report.on_call = told
    sampling.call_on(first_latent(), 0)
    with pytest.raises(interruption):
        sampling.call_on(first_latent(), 1)


@pytest.mark.skipif(ACCELERATOR_ERROR is None, reason="this torch has no AcceleratorError")
def test_a_failure_of_the_device_in_telling_is_raised():
    sampling = failing_when_told(ACCELERATOR_ERROR("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(ACCELERATOR_ERROR):
        sampling.call_on(first_latent(), 0)


def test_an_output_that_is_no_number_is_computed_and_named(toy):
    toy.head.bias.data.fill_(float("nan"))
    sampling = Sampling(toy, (FirstBlockCache(),), branches=(POSITIVE,))
    for index in range(6):
        assert sampling.call_on(first_latent(), index).isnan().all()
    assert sampling.report.count("computed") == 6
    assert any(NO_NUMBER in note for note in sampling.report.notes)
