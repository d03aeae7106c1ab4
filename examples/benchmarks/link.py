"""Two ends of a link of a given rate: network namespaces of this machine (Linux, as root).

Made by iproute2: what an end sends is held back by a token bucket of `tc`, in each direction.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class End:
    """Where a process stands: the command before its own, its interface and its address."""

    command: tuple[str, ...]
    interface: str
    address: str


LOOPBACK = [End((), "lo", "127.0.0.1")] * 2
"""Both ends on one host, as fast as its memory."""


def why_not() -> str:
    """What keeps this machine from making such a link; empty if nothing is known to."""
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing:
        return f"no {' and no '.join(missing)} (Debian's package iproute2)"
    return "" if os.geteuid() == 0 else "network namespaces take root"


@contextmanager
def throttled(rate: str) -> Iterator[list[End]]:
    """Two ends, joined while it lasts. `rate` is in tc's words, such as 1gbit or 200mbit."""
    names = [f"grass{os.getpid()}-{k}" for k in range(2)]
    inside = [("ip", "netns", "exec", name) for name in names]
    ends = [End(inside[k], f"veth{k}", f"10.77.0.{k + 1}") for k in range(2)]
    try:
        for name in names:
            _run("ip", "netns", "add", name)
        pair = [
            ("name", each.interface, "netns", name) for each, name in zip(ends, names, strict=True)
        ]
        _run("ip", "link", "add", *pair[0], "type", "veth", "peer", *pair[1])
        for end in ends:
            _run(*end.command, "ip", "addr", "add", f"{end.address}/24", "dev", end.interface)
            for interface in ("lo", end.interface):
                _run(*end.command, "ip", "link", "set", interface, "up")
            bucket = ("tbf", "rate", rate, "burst", "256kb", "latency", "100ms")
            _run(*end.command, "tc", "qdisc", "add", "dev", end.interface, "root", *bucket)
        yield ends
    finally:
        for name in names:  # its interfaces go with it
            subprocess.run(("ip", "netns", "del", name), capture_output=True)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
