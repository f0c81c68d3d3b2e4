"""The demo's text encoder: every word is a fixed vector of +1 and -1 made from its SHA-256. It has no weights."""

import hashlib
import math
from functools import lru_cache

import torch
from torch import Tensor

WORD_WIDTH = 32
TOKEN_COUNT = 8
TOKEN_WIDTH = 3 * WORD_WIDTH  # previous word, word, next word

_UNHEARD = frozenset({"a", "an", "the", "on", "at", "in", "with", "of", "background", "and", "is", "to"})


def encode(prompt: str) -> tuple[Tensor, Tensor]:
    """Tokens (8, 96) and pooled (96,) of a prompt. The empty prompt is all zeros, the trained unconditional.

    >>> tokens, pooled = encode("a big red ball")
    >>> tuple(tokens.shape), tuple(pooled.shape)
    ((8, 96), (96,))
    """
    words = heard(prompt)
    nothing = torch.zeros(WORD_WIDTH)
    vectors = [nothing, *(torch.tensor(_vector(word)) for word in words), nothing]
    tokens = torch.zeros(TOKEN_COUNT, TOKEN_WIDTH)
    for index in range(len(words)):
        tokens[index] = torch.cat(vectors[index : index + 3])
    pooled = tokens.sum(0) / math.sqrt(TOKEN_COUNT)
    return tokens, pooled


def heard(prompt: str) -> list[str]:
    """The words the model hears: lower case, without punctuation and filler words, the first eight.

    >>> heard("A big, red ball at the center!")
    ['big', 'red', 'ball', 'center']
    """
    letters = "".join(character if character.isalnum() else " " for character in prompt.lower())
    return [word for word in letters.split() if word not in _UNHEARD][:TOKEN_COUNT]


@lru_cache(maxsize=1024)
def _vector(word: str) -> tuple[float, ...]:
    digest = hashlib.sha256(word.encode()).digest()
    return tuple(1.0 if digest[bit // 8] >> (bit % 8) & 1 else -1.0 for bit in range(WORD_WIDTH))
