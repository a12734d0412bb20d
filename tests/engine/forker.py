"""Imports once, then forks a training process per line of standard input.

A line holds `key=value` arguments; the answer is the child's process id, and `exit CODE` when it is
gone. Killing a forked child is killing a training process; only the imports are not repeated.
"""

import os
import sys
from pathlib import Path

from tests.engine.narrow import narrow
from vitzoo.engine import curves, train  # noqa: F401 - imported for the children


def child(values: list[str]) -> None:
    try:
        train.train(narrow(Path(values[0]), *values[1:]))
    except Exception as error:
        sys.stderr.write(f"{error!r}\n")
        os._exit(1)
    os._exit(0)


def main() -> None:
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os.dup2(2, 1)  # The answers' pipe is the parent's.
            child(line.split())
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
        _, status = os.waitpid(pid, 0)
        sys.stdout.write(f"exit {os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
