"""Commands and options of other programs, and what they are here.

Options of Bergson 2.5.1 that mean something here are read as gradfn's; those that need no counterpart are
accepted, with a line that says why they do nothing. What gradfn does by another command, or not at all, is
answered with a sentence.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from gradfn.cli.commands import COMMANDS
from gradfn.cli.request import flag_of, slots_of
from gradfn.errors import InputError

ANY = ""
"""Instead of a command: any."""


@dataclass(frozen=True)
class There:
    """An option of another program.

    Args:
        here: the words to say instead, `{}` for its value; "": it does nothing; None: it is refused.
        why: why it does nothing, or what to do instead.
        values: how many values it has: 0, 1, or 99 for as many as come before the next option.
        names: what values are called here; of an option that does nothing, those with which it does.
        each: whether a value is several, with commas between, each of which takes the words.
    """

    here: str | None = ""
    why: str = ""
    values: int = 1
    names: Mapping[str, str] | None = None
    each: bool = False


def _nothing(why: str, values: int = 0) -> There:
    return There("", why, values)


def _refused(why: str, values: int = 1) -> There:
    return There(None, why, values)


_MEMORY = _nothing("--token-batch-size alone bounds memory, and changes no result", 1)
_FIRST = "load and change the rows first, save_to_disk, and give that folder as --dataset"
DAMPINGS = {
    "damped_inverse": "", "absolute_damped_inverse": "absolute:", "factored_tikhonov": "factored:",
    "pseudoinverse": "truncated:", "tikhonov_filtered": "tikhonov:",
}  # fmt: skip
"""What `--inversion` is called in front of a damping."""
_OPTIONS: dict[tuple[str, str], There] = {
    (ANY, "filter-modules"): There("--exclude *{}", each=True),
    (ANY, "modules score-cfg.modules"): There("--include *{}", values=99),
    (ANY, "index-cfg.precision"): There("--precision {}"),
    (ANY, "loss-fn"): There("--loss {}", names={"ce": "cross_entropy", "margin": "log_odds"}),
    (ANY, "projection-type"): There("--projection {}", names={"normal": "gaussian"}),
    (ANY, "projection-seed"): There("--seed {}"),
    (ANY, "attribute-tokens"): There("--by token", values=0),
    (ANY, "split-attention-modules"): There("--by head", values=99),
    (ANY, "use-tf32-matmuls"): There("--precision tf32", values=0),
    (ANY, "force-math-sdp"): There("--attention eager", values=0),
    (ANY, "conversation-column"): There("--messages-column {}"),
    (ANY, "use-dataset-labels"): There("--labels data", values=0),
    (ANY, "module-partitions"): There("--partitions {}"),
    (ANY, "unit-norm"): There("--unit-normalize", values=0),
    ("query", "top-k"): There("--top {}"),
    ("query", "record"): There("--csv {}"),
    (ANY, "query.dataset"): There("--query {}"),
    (ANY, "query.split"): There("--query-split {}"),
    ("query", "split"): _refused("the split of a dataset in --query is --query-split"),
    (ANY, "path"): There("--query-path {}"),
    ("hessian", "method"): There("--method {}", names={"autocorrelation": "second_moment"}),
    ("hessian", "ev-correction"): There("--method ekfac", values=0),
    (ANY, "num-heads head-size head-dim"): _nothing("heads are found from the model's config: --by head", 1),
    (ANY, "nounit-norm"): _nothing("scores are inner products unless --unit-normalize is given"),
    (ANY, "ev-correction"): _nothing("a curvature knows whether it was fitted as ekfac"),
    (ANY, "skip-hessians"): _nothing("no curvature is fitted unless it is asked for"),
    (ANY, "processor-path"): _nothing("a curvature is given as --hessian-path", 1),
    (ANY, "hessian-dtype"): _nothing("sums of a curvature are float64, or float32 of factors", 1),
    (ANY, "include-bias"): _nothing("a bias is a column of its block unless --no-biases is given"),
    (ANY, "moe-experts"): _nothing("experts are attributed unless --exclude says otherwise"),
    (ANY, "drop-columns"): _nothing("a store holds ids, losses and excerpts, and no columns of the dataset"),
    (ANY, "auto-batch-size"): _nothing("batches are of 4,096 tokens unless told otherwise"),
    (ANY, "max-batch-size query-batch-size apply-batch-size loss-batch-size"): _MEMORY,
    ("score", "batch-size"): _MEMORY,
    ("query", "batch-size"): _MEMORY,
    (ANY, "higher-is-better"): _nothing("a positive score is always a proponent"),
    (ANY, "text-field"): _nothing("a store holds an excerpt of every row", 1),
    (ANY, "resume"): _nothing("the same command resumes"),
    (ANY, "normalize-aggregated-grad"): _nothing("it multiplies all scores alike, and ranks nothing anew"),
    (ANY, "projection-target"): _refused(
        "one projection of all layers is --projection 'joint > rademacher:512'"
    ),
    (ANY, "projection-scale"): _refused("inner products are kept without bias, as jl has it: leave it out"),
    (ANY, "reshape-to-square"): _refused("flatten blocks with --projection sjlt:4096, say"),
    (ANY, "subset"): _refused("a subset stands behind the name of its dataset: --dataset DATASET:SUBSET"),
    (ANY, "max-tokens"): _refused("take the first rows with --split 'train[:1000]'"),
    (ANY, "fsdp"): _refused(
        "it shards the model of build, hessian and score, under torchrun; split rows with --shard I/N", 0
    ),
    (ANY, "nproc-per-node nnode"): _refused(
        "it is an option of torchrun: torchrun --nproc-per-node N -m gradfn ..."
    ),
    (ANY, "peft-init-kwargs"): _refused(
        "make the adapter with peft, save it, and give its folder as --model"
    ),
    (ANY, "model-kwargs"): _refused("load the model in Python, and call gf.score"),
    (ANY, "skip-nan-rewards"): _refused(_FIRST, 0),
    (ANY, "format-template data-kwargs"): _refused(_FIRST),
    (ANY, "stats-sample-size"): _refused(
        "gradfn's methods fit on all rows: fit on some with gradfn hessian --split 'train[:N]'"
    ),
    ("score", "aggregation"): _refused(
        "make one query of them with gradfn reduce, and give it as --query-path"
    ),
    ("score", "score"): There("", "every query has a column of scores", names={"individual": ""}),
    (ANY, "token-influence"): There("", "scores by token are of gradients", names={"gradient": ""}),
    ("query", "faiss"): _refused("name the index by its factory string, --index Flat, say", 0),
    ("query", "index-factory"): There("--index {}"),
    ("query", "num-shards"): _nothing("--memory says how large a part of an index may be", 1),
    ("query", "max-train-examples"): _nothing("an index is trained on as many rows as its cells need", 1),
    ("query", "mmap-index"): _nothing("an index is read from disk"),
}
OPTIONS = {(command, name): there for (command, names), there in _OPTIONS.items() for name in names.split()}
"""Options of Bergson by the command here and their name there."""
PREFIXES = ("data.", "index-cfg.", "faiss-cfg.", "hessian-cfg.", "preprocess-cfg.", "inversion-cfg.")
COMMANDS_THERE = {
    "trackstar": "gradfn score RUN --method trackstar --query QUERIES",
    "ekfac": "gradfn score RUN --method ekfac --query QUERIES",
    "trak": "gradfn score RUN --method trak --projection 'joint > rademacher:2048' --query QUERIES",
    "tracin": "gradfn score RUN --method tracin --checkpoints A,B --query QUERIES",
    "less": "gradfn score RUN --method less --optimizer-state STATE --query QUERIES",
    "logra": "gradfn score RUN --method logra --query QUERIES",
    "grass": "gradfn score RUN --method grass --query QUERIES",
    "datainf": "gradfn score RUN --method datainf --query QUERIES",
    "kfac": "gradfn hessian RUN --method kfac",
    "recall": "gradfn evaluate recall SCORES --query QUERIES",
    "lds": "gradfn retrain TRUTH, then gradfn evaluate lds TRUTH SCORES",
    "loo": "gradfn retrain TRUTH --leave-out 1, then gradfn evaluate loo TRUTH SCORES",
    "validate": "gradfn retrain TRUTH, then gradfn evaluate lds TRUTH SCORES",
    "test-model-configuration": "gradfn check MODEL",
    "collect": "gradfn build RUN",
    "lissa": "gradfn score RUN --method lissa --query QUERIES",
}
"""Commands that exist elsewhere, and what does it here."""


def translated(arguments: Sequence[str]) -> list[str]:
    """A command line with what is another program's said as gradfn says it; notes go to stderr.

    Raises:
        InputError: a command or an option that is answered with a sentence.
    """
    requests = {request.COMMAND: request for request in COMMANDS}
    if not arguments or (arguments[0] not in requests and flag_of(arguments[0]) not in COMMANDS_THERE):
        return [*arguments]
    command, words = arguments[0], [*arguments[1:]]
    if command not in requests:
        raise InputError(f"{command} is no command here: use {COMMANDS_THERE[flag_of(command)]}")
    if command == "build" and any(one in words for one in ("mean", "sum")) and "--aggregation" in words:
        command = "reduce"  # there it is an option of build
    if command == "mix":
        named = [_take(words, name) for name in ("output-path", "query-path", "index-path")]
        words = [*filter(None, named), *words]
    if command == "query" and (index := _take(words, "index")) is not None:
        # There it is the store; here, FAISS's name of an index, which begins with a capital letter.
        factory = index[:1].isupper() and not os.path.exists(index)
        words = [*words, "--index", index] if factory else [index, *words]
    kind, factor = _take(words, "inversion"), _take(words, "damping-factor")
    if kind is not None and kind not in DAMPINGS:
        raise InputError(f"no inversion {kind!r}: choose {', '.join(DAMPINGS)}, or give --damping")
    if kind is not None or factor is not None:
        words += ["--damping", f"{DAMPINGS[kind or 'damped_inverse']}{factor or '0.1'}"]
    slots = {flag_of(name): slot.plain is bool for name, slot in slots_of(requests[command]).items()}
    return [command, *_said(command, slots, words)]


def _take(words: list[str], name: str) -> str | None:
    """The value of an option, which is taken from the words with it."""
    for number, word in enumerate(words):
        spelled, equals, value = word.partition("=")
        if flag_of(spelled) == f"--{name}":
            del words[number]
            return value if equals else words.pop(number) if number < len(words) else None
    return None


def _said(command: str, slots: Mapping[str, bool], words: list[str]) -> Iterator[str]:
    """The words of a command as gradfn says them.

    Args:
        slots: the command's own options, and whether they are true or false.
    """
    while words:
        word = words.pop(0)
        if word == "--":
            yield from [word, *words]
            return
        spelled, equals, value = word.partition("=")
        key, there = _looked_up(command, slots, flag_of(spelled[2:])) if word.startswith("--") else ("", None)
        if word.startswith("--no") and slots.get(flag_of(word[4:])):
            continue
        flagged = there.values == 0 if there else slots.get(key, False)
        values = [value] if equals else _values(words, there.values if there else 0, flagged)
        if equals and flagged:
            values = [_truth(spelled, value)]
        if there is None and flagged:
            yield from [f"--{key}"] if values != ["false"] else []
        elif there is None:
            yield f"--{key}{equals}{value}" if key else word
            yield from [words.pop(0)] if key and not equals and words else []
        elif there.here is None or (not there.here and there.names and set(values) - set(there.names)):
            raise InputError(f"{spelled} is no option here: {there.why}")
        elif there.here == "":
            print(f"gradfn: {spelled} does nothing here: {there.why}", file=sys.stderr)
        elif values != ["false"]:
            parts = [part for one in values for part in one.split(",")] if there.each else values
            for part in parts if "{}" in there.here else [""]:
                here = (there.names or {}).get(part, part)
                yield from (one.replace("{}", here) for one in there.here.split(" "))


def _truth(spelled: str, value: str) -> str:
    """What a flag is set to, which a word that is neither must not switch on."""
    if value.lower() not in ("true", "false"):
        raise InputError(
            f"{spelled} is true or false, not {value!r}: give it without a value, or leave it out"
        )
    return value.lower()


def _looked_up(command: str, slots: Mapping[str, bool], key: str) -> tuple[str, There | None]:
    """The name of an option here, or what is known of it there; "" for neither."""
    for name in (key, *(key.removeprefix(prefix) for prefix in PREFIXES if key.startswith(prefix))):
        if (command, name) in OPTIONS or (name not in slots and (ANY, name) in OPTIONS):
            return name, OPTIONS.get((command, name)) or OPTIONS[ANY, name]
        if name in slots:
            return name, None
    return "", None


def _values(words: list[str], most: int, flagged: bool) -> list[str]:
    """The values that follow an option, taken from the words; a flag may be followed by true or false."""
    taken: list[str] = []
    if flagged and words and words[0].lower() in ("true", "false"):
        return [words.pop(0).lower()]
    while words and len(taken) < most and not words[0].startswith("--"):
        taken.append(words.pop(0))
    return taken
