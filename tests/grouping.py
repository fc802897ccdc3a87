"""Which tests stay together when `make test` runs them in two processes.

A pytest plug-in for pytest-xdist: the tests of one file share a process, because they share
fixtures, and so do the end-to-end tests, because they share one service and one trained model; but
for the files that only start services of their own, which may run beside them.

Not by `xdist_group` marks: xdist 3.8 writes the group into an attribute that pytest 9.2 does not
read any more, and then each test goes wherever there is room, without a word. So it is also looked
at which process each test was run by.
"""

from __future__ import annotations

import pytest
from xdist.remote import Producer  # type: ignore[import-untyped]
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

END_TO_END = "tests/e2e/"
OWN_SERVICES = tuple(
    f"{END_TO_END}test_{name}.py"
    for name in ("architectures", "disk_full", "evaluation_harness", "recovery", "units")
)
"""Files that do not use the shared service."""

_processes: dict[str, str] = {}
"""Group -> the process that has run tests of it."""


class FileScheduling(LoadScopeScheduling):  # type: ignore[misc]
    """Gives a process whole files, and all end-to-end tests to one."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


def group_of(nodeid: str) -> str:
    """Return what a test shares its process with."""
    file = nodeid.partition("::")[0]
    shares = file.startswith(END_TO_END) and file not in OWN_SERVICES
    return END_TO_END if shares else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> FileScheduling:
    """Take the place of xdist's own scheduling."""
    return FileScheduling(config, log)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """End the run where a group was torn apart."""
    node = getattr(report, "node", None)
    if node is None:
        return  # in the process that ran it
    group, process = group_of(report.nodeid), node.gateway.id
    first = _processes.setdefault(group, process)
    assert first == process, f"tests of {group} were run by {first} and by {process}"
