"""Graph archives: a user's network as a list of torch's operators, without its code, run in banks like our networks.

`record` is the file, `operators` what it may hold, `program` how it runs, `family` how many models run together, and
`export` how a module becomes one (imported by itself: servers read graphs, only packing writes them).
"""

from handlers.kinds.graph.family import GraphFamily, graph_family

__all__ = ["GraphFamily", "graph_family"]
