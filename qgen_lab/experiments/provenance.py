"""Where a stored result came from: command, configuration, seeds, versions, machine, date, time."""

import datetime
import json
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import qgen_lab


def provenance(command: str, config: dict, seeds: Sequence[int], seconds: float) -> dict:
    """Record that lies beside every stored result.

    Parameters
    ----------
    command : str
        The command that makes the result, as typed in the repository root.
    config : dict
        Everything the result depends on; must be writable as JSON.
    seeds : sequence of int
        Seeds of the runs that were kept. All that were run: none is picked by its outcome.
    seconds : float
        Wall time of the whole computation, in seconds.

    Returns
    -------
    dict
        The arguments with git revision, versions, device, threads and date (UTC).

    Raises
    ------
    TypeError
        If `config` cannot be written as JSON.
    """
    json.dumps(config)
    return {
        "command": command,
        "config": config,
        "seeds": [int(seed) for seed in seeds],
        "seconds": round(float(seconds), 1),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "revision": git_revision(),
        "versions": {
            "python": platform.python_version(),
            "qgen_lab": qgen_lab.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "device": device_name(),
        "threads": torch.get_num_threads(),
    }


def write_json(record: dict, path: str | Path) -> None:
    """Write a record as indented JSON, a newline at its end."""
    Path(path).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def git_revision() -> str:
    """Commit of the package's checkout, with "-dirty" if the package was changed since.

    "unknown" outside a checkout.
    """
    folder = Path(qgen_lab.__file__).parent
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return f"{commit}-dirty" if _git(folder, "status", "--porcelain", ".") else commit
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return result.stdout.strip()


def device_name() -> str:
    """Name of the GPU that torch would use, else of the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
