"""Training of the tiny transformers: a run that was killed goes on as if it had not been."""

from functools import partial
from statistics import mean
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers", reason="training is of diffusers' transformers, which a user may not have")
from training import flow, flux
from training import wan as training

NARROW = dict(num_attention_heads=1)  # the optimiser works in bfloat16, slow on processors without units for it
SMALL = (training.Stage(0.6, 32, 2, 2, 0.8), training.Stage(1.0, 64, 3, 1, 1.0))


@pytest.fixture(autouse=True)
def gradients():
    with torch.enable_grad():
        yield


def new_wan():
    torch.manual_seed(0)
    return training.new_learner(num_layers=1, ffn_dim=64, **NARROW)


def new_flux():
    torch.manual_seed(0)
    transformer = flux.new_transformer(num_layers=1, num_single_layers=1, **NARROW)
    return flow.Learner(transformer, muon_rate=flux.MUON_RATE, adam_rate=flux.ADAM_RATE)


OF = {
    "wan": SimpleNamespace(new=new_wan, take_step=partial(training.take_step, stages=SMALL)),
    "flux": SimpleNamespace(new=new_flux, take_step=flux.take_step),
}


@pytest.mark.parametrize("model", OF)
def test_a_killed_run_goes_on_with_the_losses_it_would_have_had(tmp_path, monkeypatch, model):
    monkeypatch.setattr(flux, "BATCH", dict.fromkeys(flux.BATCH, 5))
    new, take_step = OF[model].new, OF[model].take_step

    def losses(learner, until):
        return [take_step(learner, 8) for _ in range(until - learner.steps)]

    straight, killed = new(), new()
    expected = losses(straight, 8)
    assert losses(killed, 4) == expected[:4]
    flow.save(killed.state(), tmp_path / "checkpoint")

    again = new()
    again.go_on_from(torch.load(tmp_path / "checkpoint"))
    assert losses(again, 8) == expected[4:]
    assert all(torch.equal(*pair) for pair in zip(again.average.values(), straight.average.values(), strict=True))
    assert len(set(expected)) == 8


def test_each_stage_has_its_share_of_the_steps():
    stages = [training.stage_of(step / 100) for step in (0, 11, 12, 59, 60, 78, 100)]
    assert [stage.size for stage in stages] == [64, 64, 64, 64, 64, 96, 96]
    assert [stage.frames for stage in stages] == [5, 5, 5, 5, 15, 15, 15]
    assert [stage.every for stage in stages] == [1, 1, 3, 3, 1, 1, 1]


def test_some_steps_lower_the_loss():
    learner, stages = new_wan(), (training.Stage(1.0, 32, 2, 4, 0.8),)
    losses = [training.take_step(learner, 150, stages) for _ in range(150)]
    assert mean(losses[-20:]) < 0.75 * mean(losses[:20])


def test_an_untrained_transformer_makes_videos_that_can_be_measured(tmp_path):
    learner = training.new_learner()
    shares = training.measure(learner, training.Stage(1.0, 32, 2, 1, 1.0), tmp_path / "seen.png")
    assert shares["all"] == 0
    assert (tmp_path / "seen.png").stat().st_size > 0
