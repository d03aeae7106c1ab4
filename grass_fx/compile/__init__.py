"""From a graph to what runs: how Inductor lowers it, when its collectives start, its dumps, and
the callable that Dynamo runs."""
