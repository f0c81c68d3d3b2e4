"""Counts how often ComfyUI casts a layer's weights, and how often it fetches those of a block that it streams."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from kept_weights import block_of


def count_casts(model, monkeypatch):
    """Counts from now on how often ComfyUI casts a layer's weights, by block."""
    import comfy.ops

    counts, own = Counter(), comfy.ops.cast_bias_weight
    blocks = {id(module): block_of(name) for name, module in model.model.diffusion_model.named_modules()}

    def cast(layer, *args, **kwargs):
        counts[blocks.get(id(layer), "")] += 1
        return own(layer, *args, **kwargs)

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", cast)
    return counts


class Streamed:
    """A model of the zoo whose blocks' weights ComfyUI streams, fetched block by block: on a GPU only, but for this."""

    def __init__(self, architecture, chain, monkeypatch):
        self._prefetch = pytest.importorskip("comfy.model_prefetch")
        self._architecture, self.model = architecture, architecture.build()
        self._layers, self._fetched = [], []
        for block in self.model.model.diffusion_model.get_submodule(chain):
            layer = next(module for module in block.modules() if isinstance(module, torch.nn.Linear))
            layer._v = "on its way"  # the mark of a layer whose weights are streamed
            self._layers.append(layer)
        self._patch(monkeypatch)

    def sample(self, model):
        latent = self._architecture.sample(model, self._architecture.empty_latent(), steps=12)
        self._prefetch.cleanup_prefetch_queues()  # what ComfyUI does after each node
        return latent

    @property
    def fetches(self):
        """How often each block's weights were fetched, in the order of the blocks."""
        counts = Counter(self._fetched)
        return [counts[layer] for layer in self._layers]

    def _patch(self, monkeypatch):
        import comfy.ops

        def make(queue, device, options):
            self._prefetch.PREFETCH_QUEUES.append([None, *queue, None])
            return self._prefetch.PREFETCH_QUEUES[-1]

        def fetch(chosen, *args, **kwargs):
            self._fetched.extend(chosen)
            return None, True

        monkeypatch.setattr(self._prefetch, "PREFETCH_QUEUES", [])
        monkeypatch.setattr(self._prefetch, "make_prefetch_queue", make)
        monkeypatch.setattr(comfy.ops, "cast_modules_with_vbar", fetch)
