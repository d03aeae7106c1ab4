"""Turns a graph into the callable that Dynamo runs: lowerings, order of collectives, dumps."""
