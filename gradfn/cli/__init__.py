"""The command line: each command parses, builds values, calls one public function, and shows the result."""

import atexit
import gc
import sys
from io import StringIO, TextIOWrapper

from gradfn.cli.app import app, report
from gradfn.cli.peers import translated

__all__ = ["main"]


def main() -> None:
    """Run the command line; errors are one sentence, with `--debug` a traceback too."""
    atexit.register(gc.freeze)  # looking for cycles among all that torch imports takes a second at the end
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    if not arguments or arguments in [[group.name] for group in app.registered_groups]:
        arguments.append("--help")
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed by who started this
            setattr(sys, name, StringIO())
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a letter is no reason to stop
    try:
        status = app(translated(arguments), prog_name="gradfn", standalone_mode=False)
    except Exception as error:
        if debug:
            raise
        status = report(error)
    if status:
        sys.exit(status)
