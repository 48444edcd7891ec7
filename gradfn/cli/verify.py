"""`gradfn verify`: whether the files of a run hold what was written."""

from pathlib import Path

from gradfn.cli.commands import VerifyRequest, spelled
from gradfn.cli.console import console
from gradfn.errors import InputError
from gradfn.report.progress import progress_bar
from gradfn.report.tables import facts
from gradfn.report.words import clean, count
from gradfn.runs.shards import shards_of
from gradfn.store.file import place_of
from gradfn.store.reader import request_beside
from gradfn.store.verify import check_files, files_below

NAMED = 8
"""Files that an error names; the lines before it name all."""


def run_verify(request: VerifyRequest) -> None:
    """Read every file, name the damaged ones, and the commands that make them again."""
    run, checked = request.run, []
    with progress_bar("verify", len(files_below(run)), "files") as progress:
        for one in check_files(run):
            checked.append(one)
            progress(1)
    # An index says of its segments what these say themselves, who come first.
    wrong = list({one.wrong: one for one in reversed(checked) if one.wrong}.values())[::-1]
    files = count(len(checked), "file")
    if not wrong:
        older = sum(one.header is not None and not one.header.digests for one in checked)
        note = ("note", f"{count(older, 'file')} of an older gradfn: checksums alone, and no digests")
        console().print(
            facts([("verified", f"{files} of {run}: all as written"), *([note] if older else [])])
        )
        return
    commands = list(dict.fromkeys(_again(one.path) for one in wrong))
    for line in dict.fromkeys([*(one.wrong for one in wrong), *commands]):
        print(clean(line))  # whole, since a command that is cut is none
    named = ", ".join(str(one.path) for one in wrong[:NAMED])
    them, is_are = ("it", "is") if len(wrong) == 1 else ("them", "are")
    raise InputError(
        f"{len(wrong):,} of {files} of {run} {is_are} damaged ({named}): delete {them} and run "
        f"{' and '.join(commands)}, which recomputes only what is gone"
    )


def _again(path: Path) -> str:
    """The command that makes a damaged file again, as another file of its kind records it."""
    folder, kind = place_of(path)
    if kind in shards_of(folder):
        return f"gradfn merge {folder}"
    request = request_beside(path)
    return spelled(request) if request else "the command that made it"
