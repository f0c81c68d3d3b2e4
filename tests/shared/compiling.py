"""torch.compile with a backend that counts, and the graph breaks that dynamo counts itself."""

from collections import Counter
from contextlib import contextmanager

import torch


class Compiler:
    """A backend that counts the graphs it is given, and their runs by how many attentions they hold."""

    def __init__(self):
        self.graphs, self.runs = 0, Counter()

    def __call__(self, graph, inputs):
        self.graphs += 1
        attentions = sum("scaled_dot_product" in str(node.target) for node in graph.graph.nodes)

        def run(*args):
            self.runs[attentions] += 1
            return graph.forward(*args)

        return run


@contextmanager
def counting():
    """A new backend, with nothing compiled or counted before, and nothing left compiled after."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield Compiler()
    torch._dynamo.reset()


def breaks():
    """How often dynamo has broken a graph."""
    return sum(torch._dynamo.utils.counters["graph_break"].values())
