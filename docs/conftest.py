"""Pages that train are run once for each change, not in the developer's loop: `-m "not slow"` leaves them out."""

from pathlib import Path

import pytest

#: Extensions of the site's builder, which the tests do not install.
collect_ignore = ["theme"]

SLOW = {"curvature.md", "distributed.md", "frameworks.md", "masks.md", "processes.md", "report.md"}


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if item.path.parent == here and item.path.name in SLOW:
            item.add_marker(pytest.mark.slow)
