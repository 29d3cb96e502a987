"""The benchmark still runs what it measures of ours."""

import os
import re
import sys

import pytest
from support import HERE, run


def test_the_smallest_tables_run_and_every_widget_is_made_once() -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    options = ["--table", "queues,own-maker", "--only", "ours", "--rounds", "1", "--count", "40"]
    done = run(sys.executable, "-m", "bench", *options, cwd=HERE)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| ours \| [\d.,]+ \|.* \| yes \| \w", done.stdout, re.MULTILINE)
    assert len(rows) == 2, done.stdout
