"""`vitzoo bench gpu` for a machine that has torch, triton and numpy, but not timm or typer."""

import argparse
import importlib.util
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


sys.path.insert(0, str(ROOT))
if importlib.util.find_spec("timm") is None:
    # The operators need no timm, but the package's front does: stand in for it. Here and not in
    # `main`, because the processes that share the checks run this file up to `main`.
    package = types.ModuleType("vitzoo")
    package.__path__ = [str(ROOT / "vitzoo")]
    sys.modules["vitzoo"] = package


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--enable", action="store_true")
    parser.add_argument("--seconds", type=float, default=450.0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "gpu.json")
    arguments = parser.parse_args()
    from vitzoo.engine.bench_gpu import run_gpu
    from vitzoo.engine.bench_gpu_table import write
    from vitzoo.errors import InputError

    def save(report: dict) -> None:
        write(report, arguments.out)

    try:
        run_gpu(seconds=arguments.seconds, enable=arguments.enable, say=print, save=save)
    except InputError as error:
        print(f"vitzoo: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
