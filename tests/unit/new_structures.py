"""Small models that do what models of 2026 do and the toy of all tests does not. Called as that one is."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from toy import TEXT, Attention, C, FeedForward, W

FRAMES = 4


class New(nn.Module):
    """Embeddings, blocks made by `block`, a head."""

    block: type[nn.Module]

    def __init__(self, count: int = 4, **settings: bool) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed, self.embed_text, self.embed_sigma = nn.Linear(C, W), nn.Linear(C, W), nn.Linear(2, W)
            self.blocks = nn.ModuleList(self.block() for _ in range(count))
            self.head = nn.Linear(W, C)
            self.build(**settings)
        self.requires_grad_(False)

    def build(self) -> None:
        """What else it has."""

    def modulation(self, sigma: Tensor) -> Tensor:  # (rows, 1, W)
        angle = sigma.to(torch.float32)[:, None, None]
        return self.embed_sigma(torch.cat((angle.sin(), angle.cos()), -1))

    def kept(self) -> dict:
        """What it keeps from call to call, by place."""
        return {}

    @property
    def runs(self) -> int:
        """How often blocks ran."""
        return sum(module.runs for module in self.modules() if isinstance(module, Counted))


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.runs = 0


class CausalBlock(Counted):
    """The prefix attends to itself, the target to all. What it needs of the prefix is put into a store."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.mlp = nn.Linear(W, 3 * W), nn.Linear(W, W), FeedForward()

    def forward(self, x: Tensor, still: Tensor, moving: Tensor, prefix: int, store: dict, index: int) -> Tensor:
        self.runs += 1
        tokens = x.shape[1]
        steady = torch.arange(tokens)[:, None] < prefix
        modulated = x + torch.where(steady, still, moving)
        query, key, value = self.qkv(modulated).chunk(3, dim=-1)  # (rows, tokens, W)
        attend = nn.functional.scaled_dot_product_attention
        if prefix:
            store[index] = (key[:, :prefix].clone(), value[:, :prefix].clone())
        else:
            key, value = (torch.cat(pair, 1) for pair in zip(store[index], (key, value)))
        parts = [attend(query[:, :prefix], key[:, :prefix], value[:, :prefix])] if prefix else []
        parts += [attend(query[:, prefix:], key, value)] if prefix < tokens else []
        x = x + self.out(torch.cat(parts, 1))
        return x + self.mlp(x)


class Prefix(New):
    """Text and references are a prefix that does not see the noise: their keys and values are kept, by prompt.

    The first call of a prompt runs prefix and target, in one sequence or block by block one after the other
    (Qwen-Image 2.1); later ones run the target alone. Without a store each call runs both: a block-causal joint stream.
    """

    block = CausalBlock

    def build(self, stores: bool = True, in_turns: bool = False) -> None:
        self.stores, self.in_turns, self.store, self.prefix_passes = stores, in_turns, {}, 0

    def forward(self, latent: Tensor, sigma: Tensor, text: Tensor, control: Tensor | None = None) -> Tensor:
        x, still, moving = self.embed(latent), self.modulation(0 * sigma), self.modulation(sigma)
        slot = self.store.setdefault(tuple(text.flatten().tolist()), {}) if self.stores else {}
        if len(slot) == len(self.blocks):
            for index, block in enumerate(self.blocks):
                x = block(x, still, moving, 0, slot, index)
            return self.head(x)
        prefix = self.embed_text(text)
        self.prefix_passes += 1
        if not self.in_turns:
            x = torch.cat((prefix, x), 1)
        for index, block in enumerate(self.blocks):
            if self.in_turns:
                prefix = block(prefix, still, moving, TEXT, slot, index)
            x = block(x, still, moving, 0 if self.in_turns else TEXT, slot, index)
        return self.head(x if self.in_turns else x[:, TEXT:])

    def kept(self) -> dict:
        slots = {f"{prompt} {index}": pair for prompt, slot in self.store.items() for index, pair in slot.items()}
        return {f"{place} {name}": value for place, pair in slots.items() for name, value in zip("kv", pair)}


class SparseBlock(Counted):
    """Attends to keys less the mean of those of the last time it ran for this prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.mlp, self.means = nn.Linear(W, 3 * W), nn.Linear(W, W), FeedForward(), {}

    def forward(self, x: Tensor, moving: Tensor, prompt: tuple) -> Tensor:
        self.runs += 1
        query, key, value = self.qkv(x + moving).chunk(3, dim=-1)
        mean = self.means.get(prompt, torch.zeros(W))
        self.means[prompt] = key.mean(1, keepdim=True)
        nearest = ((key - mean).norm(dim=-1) > (key - mean).norm(dim=-1).median())[:, None]
        x = x + self.out(nn.functional.scaled_dot_product_attention(query, key - mean, value, attn_mask=nearest))
        return x + self.mlp(x)


class Sparse(New):
    """Sparse attention that keeps statistics of the last computed evaluation, by block and prompt."""

    block = SparseBlock

    def forward(self, latent: Tensor, sigma: Tensor, text: Tensor, control: Tensor | None = None) -> Tensor:
        x, moving = torch.cat((self.embed_text(text), self.embed(latent)), 1), self.modulation(sigma)
        for block in self.blocks:
            x = block(x, moving, tuple(text.flatten().tolist()))
        return self.head(x[:, TEXT:])

    def kept(self) -> dict:
        return {f"{n} {key}": mean for n, block in enumerate(self.blocks) for key, mean in block.means.items()}


class PlainBlock(Counted):
    """Attention and a feed-forward network, modulated."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(), FeedForward()

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        self.runs += 1
        x = x + self.attn(x + modulation)
        return x + self.mlp(x + modulation)


class Referring(New):
    """Blocks are given text, target and references, three times as many tokens as the target, which is what counts."""

    block = PlainBlock

    def forward(self, latent: Tensor, sigma: Tensor, text: Tensor, control: Tensor | None = None) -> Tensor:
        target, count = self.embed(latent), latent.shape[1]
        references = self.embed(torch.linspace(-1, 1, 2 * count)[None, :, None].expand(len(latent), -1, C))
        x = torch.cat((self.embed_text(text), target, references), 1)
        is_target = torch.arange(x.shape[1])[:, None] - TEXT
        is_target = (is_target >= 0) & (is_target < count)
        modulation = torch.where(is_target, self.modulation(sigma), self.modulation(0 * sigma))
        for block in self.blocks:
            x = block(x, modulation)
        return self.head(x[:, TEXT : TEXT + count])


class PerFrame(New):
    """Each frame has a noise level of its own: the modulation is as large as the tokens, and new for each block."""

    block = PlainBlock

    def forward(self, latent: Tensor, sigma: Tensor, text: Tensor, control: Tensor | None = None) -> Tensor:
        x, count = torch.cat((self.embed_text(text), self.embed(latent)), 1), latent.shape[1]
        levels = torch.linspace(1, 0.5, FRAMES).repeat_interleave(-(-count // FRAMES))[:count]
        levels = torch.cat((torch.zeros(TEXT), levels)) * sigma[:, None]
        angle = levels[..., None].to(torch.float32)
        for block in self.blocks:
            x = block(x, self.embed_sigma(torch.cat((angle.sin(), angle.cos()), -1)))
        return self.head(x[:, TEXT:])


class SoundBlock(Counted):
    """A picture and its sound, which hear and see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp, self.sound_attn, self.sound_mlp = Attention(), FeedForward(), Attention(), FeedForward()

    def forward(self, streams: tuple[Tensor, Tensor], modulation: Tensor) -> tuple[Tensor, Tensor]:
        self.runs += 1
        picture, sound = streams
        heard, seen = sound.mean(1, keepdim=True), picture.mean(1, keepdim=True)
        picture = picture + self.attn(picture + modulation) + 0.1 * heard
        sound = sound + self.sound_attn(sound + modulation) + 0.1 * seen
        return picture + self.mlp(picture), sound + self.sound_mlp(sound)


class Sounding(New):
    """Two streams of very different size: of the latent's tokens the last is the sound."""

    block = SoundBlock

    def forward(self, latent: Tensor, sigma: Tensor, text: Tensor, control: Tensor | None = None) -> Tensor:
        x, modulation = self.embed(latent), self.modulation(sigma) + self.embed_text(text).mean(1, keepdim=True)
        streams = x[:, :-1], x[:, -1:]
        for block in self.blocks:
            streams = block(streams, modulation)
        return self.head(torch.cat(streams, 1))


class Controlled(New):
    """A control branch of its own blocks is stepped inside the main loop, each step added behind a main block.

    It starts from what enters the main blocks or, `late`, from what left the first of them.
    """

    block = PlainBlock

    def build(self, late: bool = False) -> None:
        self.late, self.control_blocks = late, nn.ModuleList(PlainBlock() for _ in range(3))

    def forward(self, latent: Tensor, sigma: Tensor, text: Tensor, control: Tensor | None = None) -> Tensor:
        x, modulation = torch.cat((self.embed_text(text), self.embed(latent)), 1), self.modulation(sigma)
        branch = x + torch.linspace(-1, 1, W)
        for index, block in enumerate(self.blocks):
            x = block(x, modulation)
            if self.late and index == 0:
                branch = x + torch.linspace(-1, 1, W)
            if index < len(self.control_blocks):
                branch = self.control_blocks[index](branch, modulation)
                x = x + 0.3 * branch
        return self.head(x[:, TEXT:])


STRUCTURES = {
    "prefix in one sequence": lambda: Prefix(),
    "prefix in turns": lambda: Prefix(in_turns=True),
    "block-causal joint stream": lambda: Prefix(stores=False),
    "sparse attention with statistics": Sparse,
    "target among references": Referring,
    "two streams of very different size": Sounding,
    "modulation by frame": PerFrame,
    "control branch in the loop": Controlled,
    "control branch from the first block": lambda: Controlled(late=True),
}
