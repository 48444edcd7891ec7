"""The rooms of the library stand in one order, and the tests stand in the same rooms."""

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import gradfn

PACKAGE = Path(gradfn.__file__).parent
TESTS = Path(__file__).parent
ROOMS = (
    "types", "errors", "random", "memory", "watch", "shown", "data", "store", "linalg", "model", "subject",
    "selection", "scores", "transforms", "engine", "statistics", "exact", "methods", "runs", "hf", "train",
    "evaluate", "bridges", "report", "testing", "example", "cli",
)  # fmt: skip
"""A file imports only from its own room and from those before it."""
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
    if path.stem != "__main__"
}
UNTESTED = {
    "cli": "commands are tested by what a person does with them, not file by file",
    "testing": "the checks are tested by what they find",
}
"""Rooms whose tests do not mirror their files, and why."""
TESTED_ELSEWHERE = {
    "engine/contract": "tests/engine/test_engine.py",
    "engine/sharded": "tests/model/test_sharded.py",
    "errors": "tests/cli/test_app.py",
    "evaluate/selection": "tests/evaluate/test_comparison.py",
    "example/corpus": "tests/example/test_example.py",
    "example/train": "tests/example/test_example.py",
    "hf/queries": "tests/cli/test_contrasts.py",
    "hf/reader": "tests/hf/test_answers.py",
    "hf/images": "tests/cli/test_images.py",
    "hf/masking": "tests/cli/test_masked_lm.py",
    "linalg/maps": "tests/transforms/test_project.py",
    "linalg/spectrum": "tests/statistics/test_curvature.py",
    "memory": "tests/engine/test_cache.py",
    "model/left_out": "tests/model/test_layers.py",
    "model/trials": "tests/model/test_losses.py",
    "methods/attribution": "tests/methods/test_methods.py",
    "methods/dynamics": "tests/methods/test_source.py",
    "methods/datainf": "tests/methods/test_methods.py",
    "methods/grad_cosine": "tests/methods/test_methods.py",
    "methods/grad_dot": "tests/methods/test_methods.py",
    "methods/influence": "tests/methods/test_methods.py",
    "methods/inner_product": "tests/methods/test_methods.py",
    "model/attach": "tests/engine/test_tap.py",
    "model/convolution": "tests/model/test_layers.py",
    "model/params": "tests/model/test_losses.py",
    "model/sites": "tests/model/test_layers.py",
    "random": "tests/transforms/test_project.py",
    "report/agreement": "tests/report/test_page.py",
    "report/checks": "tests/cli/test_check_command.py",
    "report/evaluation": "tests/cli/test_evaluate.py",
    "report/nearest": "tests/cli/test_report.py",
    "report/exports": "tests/cli/test_show.py",
    "report/gathering": "tests/report/test_page.py",
    "report/page_runs": "tests/report/test_page.py",
    "report/page_texts": "tests/report/test_page.py",
    "report/page_values": "tests/report/test_page.py",
    "report/pictures": "tests/report/test_page.py",
    "report/progress": "tests/cli/test_show.py",
    "report/rankings": "tests/cli/test_show.py",
    "report/rendering": "tests/report/test_page.py",
    "report/rows": "tests/cli/test_rows.py",
    "report/runs": "tests/cli/test_build_query_reduce.py",
    "report/summaries": "tests/cli/test_score.py",
    "report/tables": "tests/cli/test_show.py",
    "report/words": "tests/cli/test_show.py",
    "runs/merge": "tests/runs/test_shards.py",
    "runs/queries": "tests/cli/test_build_query_reduce.py",
    "statistics/kfac": "tests/statistics/test_curvature.py",
    "statistics/moments": "tests/statistics/test_fold.py",
    "statistics/second_moment": "tests/statistics/test_curvature.py",
    "statistics/shampoo": "tests/statistics/test_curvature.py",
    "train/parts": "tests/train/test_record.py",
    "train/pull": "tests/train/test_magic.py",
    "train/hf_trainer": "tests/hf/test_trainer.py",
    "runs/visits": "tests/train/test_record.py",
    "store/growing": "tests/train/test_record.py",
    "transforms/fitted": "tests/statistics/test_fold.py",
    "transforms/joint": "tests/transforms/test_chain.py",
    "transforms/lower": "tests/transforms/test_chain.py",
    "transforms/precondition": "tests/statistics/test_curvature.py",
    "transforms/projection": "tests/transforms/test_project.py",
    "transforms/row_sum": "tests/transforms/test_chain.py",
    "evaluate/scored": "tests/cli/test_evaluate.py",
    "subject": "tests/engine/test_engine.py",
    "shown": "tests/hf/test_texts.py",
    "types": "tests/engine/test_engine.py",
    "watch": "tests/cli/test_show.py",
}
"""Files without a test file of their own, and the file that tests them: one idea tests several of them."""


def room_of(module):
    return [*module.split("."), ""][1]


@cache
def imports_of(module):
    """The modules of the library that a file imports, anywhere in it; of other packages the top names."""
    path = FILES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(filter(None, [above, node.module]))
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else base for name in names}
    return {name if name in FILES else name.split(".")[0] for name in found}


def test_there_are_no_other_rooms():
    assert {room_of(module) for module in FILES if room_of(module)} == {*ROOMS}


@pytest.mark.parametrize("room", ROOMS)
def test_a_file_imports_only_from_rooms_before_its_own(room):
    allowed = {*ROOMS[: ROOMS.index(room) + 1], ""}
    for module in FILES:
        if room_of(module) == room:
            used = {room_of(name) for name in imports_of(module) if name.split(".")[0] == "gradfn"}
            assert used <= allowed, module


def test_no_file_imports_itself_by_way_of_others():
    graph = {module: imports_of(module) & FILES.keys() - {module, "gradfn"} for module in FILES}
    assert len([*TopologicalSorter(graph).static_order()]) >= len(FILES) - 1


def test_hypothesis_is_imported_by_the_room_for_tests_alone():
    assert {room_of(module) for module in FILES if "hypothesis" in imports_of(module)} == {"testing"}


def mirrored():
    """The files of the library that have something to test, and the file that should test each."""
    for module, path in sorted(FILES.items()):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if room_of(module) not in ("", "__main__", *UNTESTED) and parts[-1] != "__init__":
            yield "/".join(parts), Path(*parts[:-1], f"test_{parts[-1]}.py")


def test_every_file_has_its_test_file():
    without = {name for name, test in mirrored() if not (TESTS / test).exists()}
    assert without == {*TESTED_ELSEWHERE}
    assert [where for where in TESTED_ELSEWHERE.values() if not (TESTS.parent / where).exists()] == []
