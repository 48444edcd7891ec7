"""The page of scores: its numbers, its size, that text of data never runs, and that all can read it."""

import base64
import hashlib
import json
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from pages import HOSTILE, made_scores, saved, tree

from gradfn.errors import InputError
from gradfn.hf.answers import Answer
from gradfn.report.page import LIMIT, Beside, PageRun, page_html, write_page
from gradfn.report.page_texts import texts_of
from gradfn.report.pictures import LEVELS, grid_of, lines_of
from gradfn.report.rendering import _file
from gradfn.scores import Scores


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    first = saved(folder, "one", made_scores(blocks=3, dampings=("0.1", "1")))
    return [first, saved(folder, "two", made_scores(seed=1))]


@pytest.fixture(scope="module")
def page(runs):
    return tree(page_html(runs, top=4, command="gradfn report one two"))


def data_of(page):
    return json.loads(next(one for one in page.all("script") if one.attributes.get("id") == "data").content)


def cards(section):
    return [one for one in section.all("li") if one.attributes.get("class") == "row"]


def sections(page):
    return [one for one in page.all("section") if one.attributes.get("class") == "query"]


def test_every_query_lists_its_best_rows_without_scripts(runs, page):
    scores = runs[0].scores.of_damping("0.1")
    for number, section in enumerate(sections(page)):
        best, worst = scores.top(4).rows[number].tolist(), scores.top(4, largest=False).rows[number].tolist()
        assert [int(card.attributes["data-row"]) for card in cards(section)] == best + worst
        shown = [card.of_class("score")[0].content.replace("\u2212", "-") for card in cards(section)]
        assert shown == [f"{float(scores.matrix[row, number]):+.4g}" for row in best + worst]
        assert section.of_class("query") == []
        assert f"What is {number}?" in section.content


def test_the_other_run_stands_beside_every_row(runs, page):
    column = runs[1].scores.matrix[:, 0]
    for card in cards(sections(page)[0]):
        row = int(card.attributes["data-row"])
        rank = int((column > column[row]).sum()) + 1
        assert card.of_class("other")[0].content.split("two, rank ")[1].strip() == str(rank)


def test_the_script_gets_all_scores_of_all_dampings(runs, page):
    data = data_of(page)
    assert data["depth"] is None
    assert data["ids"] == [*runs[0].scores.row_ids]
    found = torch.tensor(data["runs"][0]["scores"]).permute(0, 2, 1)
    torch.testing.assert_close(found, runs[0].scores.values, rtol=1e-3, atol=0)
    for column, (low, high, levels) in zip(
        runs[0].scores.values[1].T, data["runs"][0]["histograms"][1], strict=True
    ):
        counts, _ = np.histogram(column.numpy(), 48, (float(column.min()), float(column.max())))
        assert (low, high) == pytest.approx((float(column.min()), float(column.max())), rel=1e-3)
        assert [level != "0" for level in levels] == (counts > 0).tolist()


def test_cells_of_the_heat_map_sum_to_the_score(runs, page):
    scores, heat = runs[0].scores, data_of(page)["heat"]
    grid = grid_of(scores.shares)
    assert (heat["layers"], heat["columns"]) == (["0", "1"], ["head 0", "head 1", "head 2"])
    for key, (most, letters) in heat["cells"].items():
        query, row = map(int, key.split("-"))
        cells = grid.cells({name: float(share[0, row, query]) for name, share in scores.shares.items()})
        assert cells.sum() == pytest.approx(float(scores.values[0, row, query]), abs=1e-5)
        drawn = np.array([LEVELS.index(letter) - 31 for letter in letters]).reshape(cells.shape) * most / 31
        assert np.abs(drawn - cells).max() <= most / 61


def test_heads_of_grouped_queries_are_not_those_of_keys():
    names = [*(f"0.q[{n}]" for n in range(4)), "0.k[0]", "0.k[1]", "0.v[0]", "0.v[1]"]
    assert [*grid_of(names).columns] == ["q 0", "q 1", "q 2", "q 3", "k, v 0", "k, v 1"]


def test_a_line_ends_where_the_sum_of_its_parts_is():
    made = lines_of({0: [(1.0, 1.0), (3.0, 1.0)], 1: [(2.0, -2.0)]}, "a", "b")
    assert (made.low, made.high) == (-2, 2)
    assert [line.points.split()[-1] for line in made.lines] == ["100,0", "100,24"]


def test_texts_of_tokens_join_to_the_text():
    class Bytes:
        """A tokenizer of which a token is a byte."""

        def decode(self, ids):
            return bytes(ids).decode(errors="replace")

    text = "a Kürbis 🎃"
    pieces = texts_of(Bytes(), [*text.encode()])
    assert "".join(pieces) == text
    assert (len(pieces), pieces[:5]) == (len(text.encode()), ["a", " ", "K", "", "ü"])


# --- what a page may hold


def test_a_thousand_rows_and_fifty_queries_are_all_there_in_3_mb(tmp_path):
    run = saved(tmp_path, "large", made_scores(1000, 50))
    beside = Beside(columns={"text": ["word " * 60] * 1000, "kind": ["some"] * 1000})
    html = page_html([PageRun(run.scores, run.store, beside)])
    assert len(html.encode()) < LIMIT
    assert len(data_of(tree(html))["rows"]) == 1000


def test_a_larger_run_keeps_the_top_rows_and_says_so(tmp_path):
    run = saved(tmp_path, "larger", made_scores(6000, 60, ("0.1", "1")))
    html = page_html([run])
    assert len(html.encode()) < LIMIT
    page = tree(html)
    data = data_of(page)
    note = page.of_class("note")[0].content
    assert note.startswith(f"Only {len(data['rows']):,} of 6,000 rows are here")
    assert f"at least the {data['depth']:,} highest and lowest" in note
    for damping in ("0.1", "1"):
        for largest in (True, False):
            best = run.scores.of_damping(damping).top(data["depth"], largest=largest).rows
            assert {*best.flatten().tolist()} <= {*data["rows"]}


def test_what_cannot_be_shown_is_refused(runs, tmp_path):
    other = saved(tmp_path, "other", made_scores(31))
    for given, words in (
        ([], "there is no run to show"),
        ([runs[0], other], "other and one are of different rows"),
    ):
        with pytest.raises(InputError, match=words):
            page_html(given)
    with pytest.raises(InputError, match="`top` must be 1 or more, not 0"):
        page_html(runs, top=0)
    place = tmp_path / "page.html"
    write_page(runs, place)
    with pytest.raises(InputError, match="exists: give `overwrite=True`"):
        write_page(runs, place)
    before = place.read_bytes()
    assert write_page(runs, place, overwrite=True).read_bytes() == before
    assert [path.name for path in tmp_path.glob("*page*")] == ["page.html"]


# --- text of data never runs


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A page with hostile text in every field."""
    folder, count = tmp_path_factory.mktemp("hostile"), len(HOSTILE)
    plain = [text.replace("\ud800", "").replace("\x00", "") for text in HOSTILE]
    values = torch.randn(2, count, count, generator=torch.Generator().manual_seed(0))
    scores = Scores(values, plain, plain, (plain[0], plain[1]), shares={plain[1]: values}, query_texts=plain,
                    settings={"recipe": plain[0], plain[2]: plain[1]}, name=plain[1])  # fmt: skip
    run = saved(folder, "run", scores)
    beside = Beside(
        [Answer(1.0, 0.1, False, text) for text in HOSTILE], plain, labels=HOSTILE, notes=HOSTILE,
        columns=dict.fromkeys(HOSTILE, HOSTILE), predicted=lambda rows: dict.fromkeys(rows, HOSTILE[1]),
    )  # fmt: skip
    shown = PageRun(scores, run.store, beside, command=HOSTILE[1])
    return page_html([shown], command=HOSTILE[0])


def test_hostile_text_makes_no_element_and_no_attribute(hostile, page):
    seen, known = tree(hostile), page
    assert [one.attributes for one in seen.all("script")] == [one.attributes for one in known.all("script")]
    assert len([*seen.all("style")]) == 1
    assert not [*seen.all("img")]
    allowed = {name for one in known.all() for name in one.attributes} | {"fill-opacity"}
    names = {name for one in seen.all() for name in one.attributes}
    assert names <= allowed
    assert not [name for name in names if name.startswith("on") or name == "style"]
    targets = [one.attributes["href"] for one in seen.all() if "href" in one.attributes]
    assert all(re.fullmatch(r"#[\w-]+", target) for target in targets)
    assert "49" not in "".join(one.content for one in seen.all("h2"))


def test_the_data_ends_where_its_script_element_does(hostile):
    block = hostile.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    assert not set("<>&\u2028\u2029") & set(block)
    data = json.loads(block)
    assert data["ids"][0] == HOSTILE[0]
    assert data["columns"][HOSTILE[1]][1] == HOSTILE[1]


def test_letters_that_are_not_seen_are_written_out(hostile):
    assert not set("\x00\x1b\u202e\u2066\u2028\u2029\ud800") & set(hostile)
    assert "␛[31mred" in hostile
    assert "⟨202E⟩gnp.exe" in hostile


def test_the_policy_allows_the_page_and_nothing_else(hostile, runs):
    for html in (hostile, page_html(runs)):
        policies = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
        (policy,) = [text.replace("&#39;", "'") for text in policies]
        style = html.split("<style>")[1].split("</style>")[0]
        script = html.rsplit("<script>", 1)[1].split("</script>")[0]
        style, script = (
            base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)
        )
        assert policy == (
            f"default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; img-src data:; "
            "base-uri 'none'; form-action 'none'"
        )
        assert "http:" not in html.replace("http://127.0.0.1:9/x", "").replace(
            "http://www.w3.org/2000/svg", ""
        )
        assert "https:" not in html


# --- everybody can read it


def test_the_page_has_landmarks_headings_and_names(page):
    (root,) = page.all("html")
    assert root.attributes["lang"] == "en"
    for tag in ("header", "nav", "main", "footer", "h1", "title"):
        assert len([*page.all(tag)]) == 1, tag
    levels = [int(one.tag[1]) for one in page.all() if re.fullmatch(r"h\d", one.tag)]
    assert all(b <= a + 1 for a, b in pairwise(levels))
    ids = [one.attributes["id"] for one in page.all() if "id" in one.attributes]
    assert len(ids) == len(set(ids))
    labelled = {one.attributes.get("for") for one in page.all("label")}
    for one in page.all():
        if one.tag in ("input", "select"):
            assert one.attributes.get("id") in labelled or _inside(one, "label"), one.attributes
        if one.tag == "svg":
            assert one.attributes.get("aria-hidden") or one.attributes.get("aria-label"), one.attributes
        if one.tag == "button":
            assert one.content.strip()
        if one.tag == "section":
            assert one.attributes["aria-labelledby"] in ids
        if one.tag == "a":
            assert one.content.strip() or _inside(one, "template"), one.attributes
            assert one.attributes["href"][1:] in ids
    for table in page.all("table"):
        assert [*table.all("caption")]
        assert all(head.attributes.get("scope") for head in table.all("th"))


def _inside(one, tag):
    while one is not None and one.tag != tag:
        one = one.parent
    return one is not None


def test_what_needs_scripts_is_hidden_without_them(page):
    controls = [
        one for one in page.all() if one.tag in ("input", "select", "button") and not _inside(one, "li")
    ]
    assert controls
    for one in controls:
        while one is not None and "hidden" not in one.attributes:
            one = one.parent
        assert one is not None


def luminance(colour):
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(weight * p for weight, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def mixed(a, b, share):
    parts = ((int(a[p : p + 2], 16), int(b[p : p + 2], 16)) for p in (1, 3, 5))
    return "#" + "".join(f"{round(share * x + (1 - share) * y):02x}" for x, y in parts)


@pytest.mark.parametrize("scheme", [0, 1])
def test_letters_stand_out_from_what_is_behind_them(scheme):
    style = _file("page.css")
    pairs = dict(re.findall(r"--(\w+): light-dark\((#\w{6}, #\w{6})\)", style))
    colour = {name: pair.split(", ")[scheme] for name, pair in pairs.items()}
    for behind in ("paper", "card", "ground"):
        for letters in ("ink", "faint", "pro", "con"):
            assert contrast(colour[letters], colour[behind]) >= 4.5, (letters, behind)
        assert contrast(colour["focus"], colour[behind]) >= 3
    assert contrast(colour["on"], colour["pro"]) >= 4.5
    shades = re.findall(r"\.[pn]\d \{ background: color-mix\(in srgb, var\(--(\w+)\) (\d+)%", style)
    assert len(shades) == 8
    for name, share in shades:
        assert contrast(colour["ink"], mixed(colour[name], colour["card"], int(share) / 100)) >= 4.5, (
            name,
            share,
        )
    assert ":focus-visible { outline: 2px" in style
