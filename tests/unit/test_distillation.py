"""Training of the students of few steps: what they are asked for, who teaches whom, and what is exported."""

import random

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers", reason="training is of diffusers' transformers, which a user may not have")
from cache_core.demo import codec, sampling
from training import few_steps as training
from training.data import random_pictures

SIGMAS = torch.tensor([0.9, 0.4])


@pytest.fixture(autouse=True)
def gradients(monkeypatch):
    monkeypatch.setattr(training, "BATCH", 2)
    with torch.enable_grad():
        yield


@pytest.fixture
def given():
    """Latents and texts of two pictures, and a generator's seed."""
    torch.manual_seed(0)
    pictures, prompts = random_pictures(2, random.Random(0))
    return codec.encode(pictures), sampling.encode_prompts(prompts), torch.Generator().manual_seed(1)


def new_distillation(steps_each):
    torch.manual_seed(0)
    return training.Distillation(sampling.load_transformer(), steps_each)


@torch.no_grad()
def predicted(transformer, given):
    return sampling.velocity(transformer, given[0], SIGMAS, *given[1])


@torch.no_grad()
def test_a_student_is_asked_for_what_two_guided_steps_of_the_teacher_reach(given):
    latents, texts, generator = given
    transformer = sampling.load_transformer()
    loss = training.distillation_loss(transformer, transformer, 1, 3.0, latents, texts, generator)

    again = torch.Generator().manual_seed(1)
    torch.randint(1, (2,), generator=again)
    noise = torch.randn(latents.shape, generator=again)
    empty = sampling.encode_prompts(["", ""])

    def guided(latent, sigma):
        sigmas = torch.full((2,), sigma)
        with_prompt, without = (sampling.velocity(transformer, latent, sigmas, *each) for each in (texts, empty))
        return without + 3 * (with_prompt - without)

    middle = 0.75  # half of an even schedule at flow shift 3
    half = noise + (middle - 1) * guided(noise, 1.0)
    reached = half - middle * guided(half, middle)
    own = sampling.velocity(transformer, noise, torch.ones(2), *texts)
    torch.testing.assert_close(loss, (own - (noise - reached)).square().mean())
    assert loss > 0.1


def test_each_student_teaches_the_next(given):
    distillation = new_distillation(1)
    base = predicted(sampling.load_transformer(), given)
    torch.testing.assert_close(predicted(distillation.student, given), base)
    seen = []
    while not distillation.is_over:
        asked = distillation.students_steps
        distillation.take_step()
        taught = predicted(distillation.student, given)
        seen.append((asked, distillation.ended_student()))
        torch.testing.assert_close(predicted(distillation.teacher, given), taught)
        assert (taught - base).abs().max() > 1e-3
    assert seen == [(16, 16), (8, 8), (4, 4)]


def test_a_killed_run_goes_on_with_the_losses_it_would_have_had(tmp_path):
    straight = new_distillation(2)
    expected = []
    while not straight.is_over:
        expected.append(straight.take_step())
        straight.ended_student()
    killed = new_distillation(2)
    for _ in range(3):
        killed.take_step()
        killed.ended_student()
    torch.save(killed.state(), tmp_path / "checkpoint")
    again = new_distillation(2)
    again.go_on_from(torch.load(tmp_path / "checkpoint"))
    rest = []
    while not again.is_over:
        rest.append(again.take_step())
        again.ended_student()
    assert rest == expected[3:]


def test_the_exported_lora_is_the_student(given, tmp_path):
    distillation = new_distillation(1)
    for _, lora in training.loras(distillation.student):
        torch.nn.init.normal_(lora.up, std=0.02)
    training.export(distillation.student, tmp_path / "lora.safetensors")
    stored = load_file(tmp_path / "lora.safetensors")
    merged = sampling.load_transformer()
    with torch.no_grad():
        for name in {key.removeprefix("transformer.").rsplit(".", 2)[0] for key in stored}:
            down, up = (stored[f"transformer.{name}.lora_{kind}.weight"].float() for kind in "AB")
            merged.get_submodule(name).weight += up @ down
    student = predicted(distillation.student, given)
    torch.testing.assert_close(predicted(merged, given), student, atol=2e-3, rtol=0)
    assert (student - predicted(sampling.load_transformer(), given)).abs().max() > 0.1
    assert (tmp_path / "lora.safetensors").stat().st_size < 4e6
