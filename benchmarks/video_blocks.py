"""A stack of blocks that takes memory as a video model's does, and next to no time.

S is one hidden_states of both branches joined, in 16 bit. A block allocates what Wan's does: queries, keys and values
(3 S), four times the width in the feed-forward (4 S, twice), norms. Instead of matrices it has one weight a channel,
and attention sees the mean of all tokens: the shapes are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

VOLUME = (8, 64, 64)  # frames, height, width of the latent, (rows, 1, *VOLUME), patches of one value
TOKENS, CHANNELS, TEXT = 32768, 32, 16  # a real video's tokens in number, so that a thousand of them are few
DTYPE = torch.bfloat16
S = 2 * TOKENS * CHANNELS * DTYPE.itemsize  # bytes


class PerChannel(nn.Module):
    """Stands in for a linear layer, (..., channels) to (..., times * channels)."""

    def __init__(self, times: int = 1) -> None:
        super().__init__()
        self.times, self.weight = times, nn.Parameter(torch.randn(times * CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight if self.times == 1 else x.repeat(*[1] * (x.ndim - 1), self.times).mul_(self.weight)


class Attention(nn.Module):
    """Of the picture's tokens, (rows, tokens, channels), to themselves or to the text's."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = PerChannel(), PerChannel(), PerChannel(), PerChannel()

    def forward(self, x: Tensor, text: Tensor | None = None) -> Tensor:
        seen = x if text is None else text
        query, key, value = self.q(x), self.k(seen), self.v(seen)
        attended = torch.addcmul(value.mean(1, keepdim=True), query, key.mean(1, keepdim=True))  # a tensor of its own
        del query, key, value
        return self.o(attended)


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = PerChannel(4)

    def forward(self, x: Tensor) -> Tensor:
        wide = nn.functional.relu(self.wide(x))
        return wide[..., :CHANNELS] + wide[..., -CHANNELS:]


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward: (rows, tokens, channels), or axes of the volume for the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.cross_attn, self.ffn = Attention(), Attention(), FeedForward()

    def forward(self, x: Tensor, e: Tensor, text: Tensor) -> Tensor:
        flat = (len(x), -1, CHANNELS)
        x = torch.add(x, self.self_attn(_modulated(x, e).view(flat)).view(x.shape), alpha=0.1)
        x = torch.add(x, self.cross_attn(_normed(x).view(flat), text).view(x.shape), alpha=0.1)
        return torch.add(x, self.ffn(_modulated(x, e)), alpha=0.1)


def _normed(x: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, (CHANNELS,))


def _modulated(x: Tensor, e: Tensor) -> Tensor:
    return torch.addcmul(e, _normed(x), 1 + e)


class Video(nn.Module):
    """Embedding, blocks, head. Its features are tokens, as Wan's, or keep the volume's axes, as Cosmos-Predict2's."""

    def __init__(self, blocks: int, keeps_axes: bool) -> None:
        super().__init__()
        self.keeps_axes = keeps_axes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed, self.head = nn.Parameter(torch.randn(CHANNELS)), nn.Parameter(torch.randn(CHANNELS))
            self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.requires_grad_(False)

    def forward(self, latent: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        x = latent.squeeze(1)[..., None] * self.embed  # (rows, frames, height, width, channels)
        x = x if self.keeps_axes else x.flatten(1, 3)
        e = sigma.to(x).reshape(-1, *[1] * (x.ndim - 1)) * self.embed
        for block in self.blocks:
            x = block(x, e, text)
        return (x * self.head).mean(-1).view(latent.shape)
