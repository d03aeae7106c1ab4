"""What a timing depends on besides the code: printed above every table, stored in every file."""

import datetime
import os
import platform
from pathlib import Path

import torch

import grass_fx


def environment(device: str = "cpu") -> dict[str, str]:
    facts = {
        "torch": torch.__version__,
        "grass-fx": getattr(grass_fx, "__version__", "unknown"),
        "Python": platform.python_version(),
        "CPU": f"{cpu_model()}, {os.cpu_count()} cores",
        "threads": str(torch.get_num_threads()),
        "date": datetime.date.today().isoformat(),
    }
    if torch.device(device).type == "cuda":
        facts["GPU"] = torch.cuda.get_device_name(device)
        facts["CUDA"] = str(torch.version.cuda)
    return facts


def cpu_model() -> str:
    """The processor's name: Linux tells it in /proc/cpuinfo only, others through `platform`."""
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def as_line(facts: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())
