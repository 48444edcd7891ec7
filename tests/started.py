"""Commands in processes that torchrun starts."""

import os
import subprocess
import sys


def start(count, *arguments, restarts=0):
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", count, "--standalone",
            "--max-restarts", restarts, "-m", "gradfn", *arguments]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [str(word) for word in line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip


def torchrun(count, *arguments, restarts=0):
    """Status, stdout, and what gradfn said on stderr."""
    process = start(count, *arguments, restarts=restarts)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, [line for line in err.splitlines() if line.startswith("gradfn: ")]
