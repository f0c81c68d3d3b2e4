"""Which model a MODEL is: the same with any LoRA, loaded or not; another with other weights or another flow shift."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def identity_of(comfy):
    from cache_core.adapters.comfyui.identity import identity_of

    return identity_of


def with_lora(model, by=0.05):
    """A clone whose every weight is changed by a patch, as LoRAs are."""
    patched, network = model.clone(), model.model.diffusion_model
    changes = {name: ("diff", (torch.full_like(weight, by),)) for name, weight in network.named_parameters()}
    assert len(patched.add_patches({f"diffusion_model.{name}": change for name, change in changes.items()})) > 50
    return patched


def test_a_lora_makes_no_other_model_whether_it_is_loaded_or_not(comfy, demo, identity_of):
    model = demo.model()
    before, patched = identity_of(model), with_lora(model)
    weight = next(model.model.diffusion_model.parameters())
    as_it_was = weight.detach().clone()
    assert identity_of(patched) == before
    try:
        comfy.model_management.load_models_gpu([patched], force_full_load=True)
        loaded = next(model.model.diffusion_model.parameters())
        assert not torch.equal(loaded.detach(), as_it_was)  # the patch is baked into the model that both share
        assert identity_of(patched) == identity_of(model) == before
    finally:
        comfy.model_management.unload_all_models()
    assert identity_of(model) == before


def test_other_weights_are_another_model_and_so_is_another_flow_shift(comfy, demo, identity_of):
    from cache_core.adapters.comfyui.demo import load_model

    model, other = demo.model(), load_model()
    assert identity_of(other) == identity_of(model)
    with torch.no_grad():
        for weight in other.model.diffusion_model.parameters():
            weight += 0.01
    assert identity_of(other) != identity_of(model)
    assert identity_of(demo.shifted(model, 3.0)).halfway == 0.75 != identity_of(model).halfway
    assert identity_of(model.clone()) == identity_of(model)
