"""The tests of `on_device.py` in a process of their own, where PyTorch takes `elsewhere` for a GPU."""

import os
import subprocess
import sys
from pathlib import Path


def test_all_that_computes_does_so_on_a_second_device():
    line = [sys.executable, "-m", "pytest", "-q", "-n", "0", str(Path(__file__).with_name("on_device.py"))]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["GRADFN_ON_DEVICE"] = "1"  # see conftest.py
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
