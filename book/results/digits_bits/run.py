"""The digits experiment at the bits that `digits_qat` leaves out, with full-precision twins again.

`python book/results/digits_bits/run.py` trains what is missing and writes the tables beside this
file once all runs are whole. Data, network, recipes and what one run gives are those of
`digits_qat/run.py`, which does the work; its clean condition, where there is hardly a gap to
explain, is left out.
"""

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch

from qgen_lab.experiments.provenance import provenance, write_json

HERE = Path(__file__).parent
PARTS = HERE / "parts"  # finished runs, until all are there; not in git

spec = importlib.util.spec_from_file_location("digits", HERE.parent / "digits_qat" / "run.py")
digits = importlib.util.module_from_spec(spec)
spec.loader.exec_module(digits)

CONDITIONS = ("label-noise", "few-images")
BITS = (32, 7, 6, 5, 3, 1)
SEEDS = tuple(range(8))


def part(condition: str, bits: int, seed: int) -> Path:
    """Where a finished run waits."""
    return PARTS / f"{condition}-{bits:02d}-{seed:02d}.json"


def write_tables(origin: dict) -> None:
    """Gather all runs into the stored tables."""
    keys = [(c, b, s) for c in CONDITIONS for b in BITS for s in SEEDS]
    parts = [json.loads(part(*key).read_text()) for key in keys]
    runs = [record["run"] for record in parts]
    steps = [
        {name: record["run"][name] for name in ("condition", "bits", "seed")} | row
        for record in parts
        for row in record.get("steps", [])
    ]
    for name, rows in {"runs": runs, "steps": steps}.items():
        pd.DataFrame(rows).to_csv(HERE / f"{name}.csv", index=False, float_format="%.6g")
    seconds = sum(run["seconds"] for run in runs)
    write_json(origin | {"seconds": round(seconds, 1)}, HERE / "provenance.json")


def main() -> None:
    """Train what is missing, seed by seed; write the tables when all is there."""
    torch.set_num_threads(1)
    PARTS.mkdir(exist_ok=True)
    digits.PARTS = PARTS  # it also stores the weights of one seed there
    config = {
        "bits": BITS,
        "model": digits.MODEL,
        "conditions": {name: digits.CONDITIONS[name] for name in CONDITIONS},
        "recipes": {name: asdict(digits.RECIPES[name]) for name in CONDITIONS},
    }
    # Made before the runs: the revision and the versions are those that train.
    origin = provenance("python book/results/digits_bits/run.py", config, SEEDS, seconds=0)
    for seed in SEEDS:
        for condition in CONDITIONS:
            for bits in BITS:
                target = part(condition, bits, seed)
                if not target.exists():
                    record = digits.train(condition, bits, seed)
                    unfinished = target.with_suffix(".tmp")
                    unfinished.write_text(json.dumps(record, default=lambda a: a.tolist()))
                    unfinished.rename(target)
    write_tables(origin)


if __name__ == "__main__":
    main()
