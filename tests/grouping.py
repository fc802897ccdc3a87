"""Which tests stay together when `make test` runs them in two processes.

A pytest plug-in for `--dist loadgroup`: the tests of one file share a process, because they share
fixtures, and so do all end-to-end tests, because they share one service and one trained model.
"""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put each test into the group of its file, or into that of the shared service."""
    for item in items:
        shared = item.get_closest_marker("e2e") is not None
        group = "service" if shared else str(item.path.relative_to(item.config.rootpath))
        item.add_marker(pytest.mark.xdist_group(group))
