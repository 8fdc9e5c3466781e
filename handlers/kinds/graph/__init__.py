"""Graph archives: any network of torch's own operators, without its code, in banks like the architectures we know.

`record` is the file, `operators` what it may hold, `program` how it runs, `family` how many models run together, and
`export` how a module becomes one (imported by itself: servers read graphs, only packing writes them).
"""

from handlers.kinds.graph.family import GraphFamily, graph_family

__all__ = ["GraphFamily", "graph_family"]
