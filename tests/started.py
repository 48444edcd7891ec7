"""Commands in processes that torchrun starts."""

import os
import socket
import subprocess
import sys


def start(count, *arguments, restarts=0, place=("--standalone",)):
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", count, *place,
            "--max-restarts", restarts, "-m", "gradfn", *arguments]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [str(word) for word in line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip


def torchrun(count, *arguments, restarts=0):
    """Status, stdout, and what gradfn said on stderr."""
    return ended(start(count, *arguments, restarts=restarts))


def on_nodes(nodes, count, *arguments):
    """The same of every node, where so many processes run on each of several, which are all this machine."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    places = [
        ("--nnodes", nodes, "--node-rank", node, "--master-addr", "127.0.0.1", "--master-port", port)
        for node in range(nodes)
    ]
    return [ended(process) for process in [start(count, *arguments, place=place) for place in places]]


def ended(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, [line for line in err.splitlines() if line.startswith("gradfn: ")]
