"""Collects the registry-wide suite's results into a table of families and checks."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest

_SUITE = "tests/backbones/test_registry.py::"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--suite-table",
        metavar="FILE",
        help="write the registry-wide suite's results, family by check, to FILE (JSON)",
    )


class SuiteTable:
    """Counts passed, failed and skipped per family and check."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: dict[str, dict[str, dict[str, int]]] = defaultdict(
            lambda: defaultdict(lambda: defaultdict(int))
        )

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.nodeid.startswith(_SUITE) or not (report.when == "call" or report.skipped):
            return
        import vitzoo

        check, _, parameters = report.nodeid.removeprefix(_SUITE).partition("[")
        # xdist appends its group to the node's name.
        parameters = parameters.partition("@")[0]
        name = next(part for part in parameters.rstrip("]").split("-") if part.startswith("vz_"))
        check = check.removeprefix("test_")
        self.counts[vitzoo.info(name).family][check][report.outcome] += 1

    def pytest_sessionfinish(self) -> None:
        self.path.write_text(json.dumps(self.counts, indent=1, sort_keys=True) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--suite-table")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(SuiteTable(Path(path)))
