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
        help="write the registry-wide suite's results, family by check, to FILE (.md or JSON)",
    )


@pytest.fixture(autouse=True)
def memory_kept(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """An entry for each command that would have kept the freed memory of its process, pytest's."""
    asked: list[bool] = []
    monkeypatch.setattr("vitzoo.engine.machine.keep_freed_memory", lambda: asked.append(True))
    return asked


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
        if self.path.suffix == ".md":
            self.path.write_text(self.markdown())
        else:
            self.path.write_text(json.dumps(self.counts, indent=1, sort_keys=True) + "\n")

    def markdown(self) -> str:
        """A row a check, a column a family: models passed, and what did not pass by name."""
        families = sorted(self.counts)
        checks = sorted({check for by_check in self.counts.values() for check in by_check})
        lines = [
            "# Families and checks",
            "",
            "Models that passed each check of the registry-wide suite "
            "(`tests/backbones/test_registry.py`); a skip is a limit that the model's own record "
            "states with its reason (`vitzoo info NAME`). An empty cell: the check ran on no model "
            "of that family, since its tier takes small or distinct models only. Made by "
            "`make checks-table`.",
            "",
            f"| check | {' | '.join(families)} |",
            f"|---|{'---|' * len(families)}",
        ]
        for check in checks:
            cells = [self._cell(self.counts[family].get(check, {})) for family in families]
            lines.append(f"| {check.replace('_', ' ')} | {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"

    @staticmethod
    def _cell(outcomes: dict[str, int]) -> str:
        passed = str(outcomes["passed"]) if outcomes.get("passed") else ""
        others = [f"{outcomes[key]} {key}" for key in ("failed", "skipped") if outcomes.get(key)]
        return ", ".join(part for part in (passed, *others) if part)


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--suite-table")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(SuiteTable(Path(path)))
