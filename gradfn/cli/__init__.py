"""The command line: each command parses, builds values, calls one public function, and shows the result."""

import sys

from gradfn.cli.app import app, report

__all__ = ["main"]


def main() -> None:
    """Run the command line; errors are one sentence, with `--debug` a traceback too."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(arguments, prog_name="gradfn")
    except Exception as error:
        if debug:
            raise
        sys.exit(report(error))
