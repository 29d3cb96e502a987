"""The benchmark still runs what it measures of ours."""

import os
import re
import subprocess
import sys

import pytest
from support import HERE


def test_the_smallest_tables_run_and_every_widget_is_made_once() -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    options = ["--table", "queues,own-maker", "--only", "ours", "--rounds", "1", "--count", "40"]
    command = [sys.executable, "-m", "bench", *options]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| ours \| [\d.,]+ \|.* \| yes \| \w", done.stdout, re.MULTILINE)
    assert len(rows) == 2, done.stdout
