"""`gradfn verify`: whether the files of a run hold what was written."""

from pathlib import Path

from gradfn.cli.commands import VerifyRequest, spelled
from gradfn.cli.console import console
from gradfn.errors import InputError
from gradfn.report.progress import progress_bar
from gradfn.report.tables import facts
from gradfn.report.words import clean, count
from gradfn.runs.shards import shards_of
from gradfn.store.file import DIGESTED, place_of
from gradfn.store.folder import DIGESTS, sealed_in
from gradfn.store.reader import request_beside
from gradfn.store.repair import TRAINING, repair
from gradfn.store.verify import check_files, files_below

NAMED = 8
"""Files that an error names; the lines before it name all."""


def run_verify(request: VerifyRequest) -> None:
    """Read every file, name the damaged ones or remove them, and the commands that make them again."""
    run, checked = request.run, []
    with progress_bar("verify", len(files_below(run)), "files") as progress:
        for one in check_files(run):
            checked.append(one)
            progress(1)
    # An index says of its segments what these say themselves, who come first.
    damaged = [one for one in checked if one.wrong]
    wrong = list({one.lost.resolve() if one.lost else one.wrong: one for one in damaged[::-1]}.values())[::-1]
    files = count(len(checked), "file")
    if not wrong:
        older = [one for one in checked if one.header is not None and one.header.format < DIGESTED]
        lines = [("verified", f"{files} of {run}: {'no damage found' if older else 'all as written'}")]
        folders = (path.parent for path in Path(run).glob("checkpoint-*/config.json"))
        if models := [folder for folder in folders if not (folder / DIGESTS).exists()]:
            lines.append(
                ("note", f"the weights of {count(len(models), 'checkpoint')} have no digest: not checked")
            )
        if older:
            commands = " and ".join(dict.fromkeys(_again(one.path) for one in older))
            lines.append(
                ("note",
                 f"{count(len(older), 'file')} written before digests were kept: only structure was checked, "
                 f"and zeros in the place of data cannot be seen; make again with {commands}")
            )  # fmt: skip
        console().print(facts(lines))
        return
    commands = list(dict.fromkeys(_again(one.path) for one in wrong))
    if request.repair:
        for path in repair(run, wrong):
            print(clean(f"removed {path}"))
        print(clean(f"now run {' and '.join(commands)}, which makes only what was removed"))
        return
    for line in dict.fromkeys([*(one.wrong for one in wrong), *commands]):
        print(clean(line))  # whole, since a command that is cut is none
    named = ", ".join(str(one.path) for one in wrong[:NAMED])
    them, is_are = ("it", "is") if len(wrong) == 1 else ("them", "are")
    remove = "give --repair" if any(map(sealed_in, (one.path for one in wrong))) else f"delete {them}"
    raise InputError(
        f"{len(wrong):,} of {files} of {run} {is_are} damaged ({named}): {remove} and run "
        f"{' and '.join(commands)}, which recomputes only what is gone"
    )


def _again(path: Path) -> str:
    """The command that makes a damaged file again, as another file of its kind records it."""
    folder, kind = place_of(path)
    if (checkpoint := sealed_in(path)) is not None:
        path = checkpoint.parent / f"{TRAINING}.h5"
    elif kind in shards_of(folder):
        return f"gradfn merge {folder}"
    request = request_beside(path)
    return spelled(request, path) if request else "the command that made it"
