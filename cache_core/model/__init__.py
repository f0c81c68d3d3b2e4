"""What is known of a model: its chains of blocks and how they are found, hooks, attention, compilation, work."""

from .attention import is_attention, kind_of, kind_of_operation
from .chains import BlockPlan, Chain, block_lists, weights_in
from .compiled import INSIDE, Compilation, method_of, own_name, uncompiled
from .counting import Counter, attention_work, tokens_in
from .hooks import Around, Forward, Hook, HookRegistry, collecting
from .lesson import ChainStreams, Lesson
from .parts import parts_in, parts_of
from .rehearsal import Stage, rehearse
from .structure import Structure, flattened, is_feature, tensors_in
from .work import Work

__all__ = [
    "Around", "BlockPlan", "Chain", "ChainStreams", "Compilation", "Counter", "Forward", "Hook", "HookRegistry",
    "INSIDE", "Lesson", "Stage", "Structure", "Work", "attention_work", "block_lists", "collecting", "flattened",
    "is_attention", "is_feature", "kind_of", "kind_of_operation", "method_of", "own_name", "parts_in", "parts_of",
    "rehearse", "tensors_in", "tokens_in", "uncompiled", "weights_in",
]  # fmt: skip
