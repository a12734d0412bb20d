"""`vitzoo bench gpu` for a machine that has torch, triton and numpy, but not timm or typer."""

import argparse
import importlib.util
import json
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--enable", action="store_true")
    parser.add_argument("--seconds", type=float, default=450.0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "gpu.json")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if importlib.util.find_spec("timm") is None:
        # The operators need no timm, but the package's front does: stand in for it.
        package = types.ModuleType("vitzoo")
        package.__path__ = [str(ROOT / "vitzoo")]
        sys.modules["vitzoo"] = package
    from vitzoo.engine.bench_gpu import run_gpu
    from vitzoo.errors import InputError

    try:
        report = run_gpu(seconds=arguments.seconds, enable=arguments.enable, say=print)
    except InputError as error:
        print(f"vitzoo: {error}", file=sys.stderr)
        return 2
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
