"""After many deaths there is no more of anything than before them.

`python -m tests.kit.deaths` has more deaths, and those of nodes.
"""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.cluster


def test_the_deaths_of_engines_leave_nothing(model: str) -> None:
    """The last one hangs, which left most; in a process that has no other test's threads."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kit.deaths", "--engines", "1"],
        env=os.environ
        | {"LLUMNIX_TEST_MODEL": model, "PYTHONPATH": os.pathsep.join([".", *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count(" hangs: ") == 1 and "nothing has grown" in done.stdout
    assert "Exception ignored" not in done.stderr
