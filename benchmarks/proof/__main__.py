"""Run all proofs, or those whose name begins with an argument; exit 1 if one fails."""

import importlib
import json
import os
import pkgutil
import platform
import sys
import time
from pathlib import Path

import timm
import torch

import benchmarks.proof as package
from benchmarks.proof._table import render

RESULTS = Path(__file__).parents[1] / "results" / "proof"
TABLE = Path(__file__).parents[1] / "proof.md"


def main() -> int:
    wanted = tuple(sys.argv[1:]) or ("",)
    failed = []
    for module in pkgutil.iter_modules(package.__path__):
        if module.name.startswith("_"):
            continue
        bars = importlib.import_module(f"benchmarks.proof.{module.name}").BARS
        for name, prove in bars.items():
            if not name.startswith(wanted):
                continue
            print(f"== {name}", flush=True)
            started, cpu = time.monotonic(), time.process_time()
            found = prove()
            # On a shared machine the clock says little; the processor's time is the work's.
            spent = {
                "seconds": round(time.monotonic() - started, 1),
                "cpu_seconds": round(time.process_time() - cpu, 1),
            }
            facts = {"name": name, **spent, **found}
            facts["load"] = os.getloadavg()[0]
            facts["versions"] = {"torch": torch.__version__, "timm": timm.__version__}
            facts["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
            RESULTS.mkdir(parents=True, exist_ok=True)
            (RESULTS / f"{name}.json").write_text(json.dumps(facts, indent=2) + "\n")
            print(json.dumps(facts), flush=True)
            if not facts["passed"]:
                failed.append(name)
    TABLE.write_text(render([json.loads(path.read_text()) for path in RESULTS.glob("*.json")]))
    if failed:
        print(f"failed: {', '.join(failed)}")
    return len(failed) > 0


if __name__ == "__main__":
    sys.exit(main())
