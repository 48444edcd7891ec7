"""The page in headless Chromium: nothing leaves, hostile text does not run, keys and filter work."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from pages import HOSTILE, made_scores, saved

from gradfn.hf.answers import Answer
from gradfn.report.page import Beside, PageRun, write_page
from gradfn.report.page_texts import shade
from gradfn.report.pictures import Scatter
from gradfn.scores import Scores
from gradfn.store import Store

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
]
sync_api = pytest.importorskip("playwright.sync_api")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser):
    """Opens a page; what it logs, and what it asks for besides, is refused at the end."""
    wrong, contexts = [], []

    def open_page(path, address="", **how):
        contexts.append(browser.new_context(viewport={"width": 1300, "height": 900}, **how))
        page = contexts[-1].new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request",
            lambda request: request.url.startswith(("file:", "blob:", "data:")) or wrong.append(request.url),
        )
        page.goto(f"file://{path}{address}")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    first = saved(folder, "one", made_scores(blocks=3, dampings=("0.1", "1")))
    write_page([first, saved(folder, "two", made_scores(seed=1))], folder / "page.html", top=4)
    return folder


class Tokens(Store):
    """A store of rows of two tokens each."""

    def read(self, name):
        return np.arange(60)

    def index_array(self, name):
        return np.arange(0, 62, 2)


class Letters:
    """A tokenizer whose tokens are numbers."""

    def decode(self, ids):
        return "".join(f" {number}" for number in ids)


def at(scores, dampings):
    """Scores at some of their dampings."""
    places = [scores.dampings.index(name) for name in dampings]
    shares = {name: share[places] for name, share in scores.shares.items()}
    return replace(scores, values=scores.values[places], dampings=dampings, shares=shares)


def shown(page):
    """The rows that can be seen, by number."""
    return page.eval_on_selector_all(
        "li.row", "all => all.filter(li => li.offsetParent).map(li => Number(li.dataset.row))"
    )


def test_keys_filter_order_and_dampings_work(opened, place):
    page, scores = opened(place / "page.html"), Scores.load(place / "one")

    def best(damping, query, k=10):
        one = scores.of_damping(damping)
        ups, downs = one.top(k).rows[query].tolist(), one.top(k, largest=False).rows[query].tolist()
        values = one.matrix[:, query]
        return [row for row in ups if values[row] > 0] + [row for row in downs if values[row] < 0]

    assert shown(page) == best("0.1", 0)
    page.keyboard.press("n")
    assert page.url.endswith("#q1")
    assert shown(page) == best("0.1", 1)
    page.keyboard.press("j")
    page.keyboard.press("j")
    row = best("0.1", 1)[1]
    assert page.url.endswith(f"#q1-r{row}")
    assert page.evaluate("document.activeElement.textContent.trim()") == f"row-{row}"
    page.keyboard.press("k")
    assert page.url.endswith(f"#q1-r{best('0.1', 1)[0]}")
    page.fill("#damping", "1")
    assert shown(page) == best("1", 1)
    assert page.inner_text("#damped output") == "1"
    page.select_option("#order", "low")
    assert shown(page)[:3] == scores.of_damping("1").top(3, largest=False).rows[1].tolist()
    page.keyboard.press("Escape")
    page.click("h1")
    page.keyboard.press("/")
    page.keyboard.type("row-17")
    assert shown(page) == [17]
    assert page.inner_text("#told") == "1 of 1 rows"
    page.fill("#filter", "")
    page.select_option("#order", "differ1")
    assert len(shown(page)) == 10
    page.select_option("#run", "1")  # from which a run does not differ
    assert page.input_value("#order") == "sides"
    assert page.is_disabled("#order option[value=differ1]")
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before


def marks(page):
    """Of every row that can be seen the text that is marked, with its shade."""
    return page.evaluate("""() => Object.fromEntries(
      [...document.querySelectorAll("li.row")].filter((li) => li.offsetParent)
        .map((li) => [li.dataset.row, [...li.querySelectorAll("mark")]])
        .map(([row, marked]) => [row, marked.map((mark) => mark.className + mark.textContent)])
    )""")


def test_the_slider_moves_all_that_depends_on_the_damping(opened, tmp_path):
    """Scores, histogram, ranks, agreement, the map and the marks, as a page of one damping has them."""
    draw = torch.Generator().manual_seed(0)
    made = made_scores(blocks=2, dampings=("0.1", "1"))
    tokens = torch.randn(2, 60, 3, generator=draw)
    by_token = Scores(tokens, [f"row-{n // 2}" for n in range(60)], made.query_ids, made.dampings,
                      documents=torch.arange(60) // 2, positions=torch.arange(60) % 2,
                      query_texts=made.query_texts, name="tokens")  # fmt: skip

    def runs(dampings):
        """Both runs at some dampings."""
        first = saved(tmp_path, "-".join(("one", *dampings)), at(made, dampings))
        values = at(by_token, dampings)
        rows = torch.stack([v[0::2] + v[1::2] for v in values.values])
        whole = Scores(
            rows, made.row_ids, made.query_ids, dampings, query_texts=made.query_texts, name="tokens"
        )
        store = saved(tmp_path, "-".join(("tokens", *dampings)), whole).store
        run = PageRun(whole, Tokens(store.path, store.header), Beside(tokenizer=Letters()), values)
        return [run, PageRun(replace(first.scores, name="one"), first.store)]

    for name, dampings in (("both", ("0.1", "1")), ("last", ("1",))):
        write_page(runs(dampings), tmp_path / f"{name}.html", top=4)
    page, known = opened(tmp_path / "both.html"), opened(tmp_path / "last.html")
    page.fill("#damping", "1")
    for query in range(3):
        for one in (page, known):
            one.click(f"nav li:nth-child({query + 1}) a")
        first = shown(known)
        assert shown(page) == first
        assert marks(page)[str(first[0])] == marks(known)[str(first[0])] != []
        assert sum(map(bool, marks(page).values())) >= 8
        for what in (".score", ".rank", ".all .ends", ".blocks .strongest"):
            texts = [one.locator(f"section.query:visible {what}").all_inner_texts() for one in (page, known)]
            assert texts[0] == texts[1], what
        for path in (".bins", ".rug", ".heat .cells", ".histogram > .axis"):
            drawn = [
                one.locator(f"section.query:visible {path}").first.evaluate("e => e.outerHTML")
                for one in (page, known)
            ]
            assert drawn[0] == drawn[1], path
        told = [one.locator("section.query:visible .agrees").inner_text() for one in (page, known)]
        assert told[0].replace(" (damping 1)", "") == told[1]
    page.select_option("#run", "1")
    assert page.inner_text("#damped output") == "1"
    assert page.inner_text("section.query:visible .shown") == "one (damping 1)"
    page.goto(page.url.split("#")[0] + "#q1-m1-d0")
    page.wait_for_function("document.querySelector('#damped output').textContent === '0.1'")
    assert page.input_value("#run") == "1"


def test_lines_over_a_training_say_at_which_damping_they_are(opened, tmp_path):
    run = saved(tmp_path, "run", made_scores(blocks=1, dampings=("0.1", "1")))
    over = replace(run.scores, settings={"checkpoints": []})
    write_page([PageRun(over, run.store)], tmp_path / "page.html")
    page = opened(tmp_path / "page.html")
    assert page.inner_text("#still:visible") == "Lines over the training stay those of damping 0.1."


def test_one_moves_among_the_tokens_of_a_text(opened, tmp_path):
    texts = ["The\u00a0→  capital", "The capital\u00a0→  is", "Who?\u00a0→  I"]
    run = saved(tmp_path, "run", replace(made_scores(), query_texts=texts))
    of = {"query": {"tokens_of": [0, 0, 1]}}
    write_page([PageRun(replace(run.scores, settings=of), run.store)], tmp_path / "page.html")
    page, values = opened(tmp_path / "page.html"), run.scores.values[0]
    assert page.locator("nav li").all_inner_texts() == ["The capital is", "Who? I"]
    assert page.locator(".whole:visible").count() == 1
    assert page.inner_text(".asked:visible") == "The capital is"

    def shaded():
        return page.eval_on_selector_all(
            ".token", "all => all.filter(a => a.offsetParent).map(a => a.className)"
        )

    page.click(".token:visible >> text=is")
    assert page.url.endswith("#q1")
    assert page.inner_text(".token[aria-current]") == " is"
    row = int(values[:, 1].argmax())
    assert page.inner_text(".whole:visible .of") == f"row-{row}"
    page.keyboard.press("j")
    page.keyboard.press("j")
    row = int(values[:, 1].topk(2).indices[1])
    most = values[row, :2].abs().max()
    assert shaded() == [f"token {shade(float(value), float(most))}" for value in values[row, :2]]
    page.keyboard.press("n")
    assert page.inner_text(".asked:visible") == "Who? I"
    page = opened(tmp_path / "page.html", java_script_enabled=False)
    assert page.locator(".asked:visible").all_inner_texts() == ["The capital is", "Who? I"]
    total = values[:, :2].sum(1).argmax()
    assert page.locator(".whole .of").first.inner_text() == f"row-{int(total)}"


# --- everybody can use it

CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const parts = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].map((part) => part / 255);
  };
  const over = (top, below) => below.map((part, n) => n === 3 ? 1 : top[n] * top[3] + part * (1 - top[3]));
  const behind = (element) => {
    if (!element) return [0.5, 0.5, 0.5, 1];
    return over(parts(getComputedStyle(element).backgroundColor), behind(element.parentElement));
  };
  const light = (colour) => colour.slice(0, 3)
    .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, n) => sum + part * [0.2126, 0.7152, 0.0722][n], 0);
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, style = getComputedStyle(element);
    const text = walker.currentNode.data.trim();
    if (!text || !element.checkVisibility() || element.closest("script, option")) continue;
    const paint = element.closest("svg") ? style.fill : style.color, ground = behind(element);
    const [high, low] = [light(over(parts(paint), ground)), light(ground)].sort((a, b) => b - a);
    found.push([(high + 0.05) / (low + 0.05), element.outerHTML.slice(0, 50), text.slice(0, 30)]);
  }
  return found;
}"""
UNNAMED = """() => {
  const labelled = (e) => [...(e.labels || [])].some((label) => label.textContent.trim());
  const named = (e) => e.getAttribute("aria-label") || labelled(e) || e.textContent.trim();
  const all = [...document.querySelectorAll("a, button, input, select, summary")];
  return all.filter((e) => e.checkVisibility() && !named(e)).map((e) => e.outerHTML);
}"""
PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACw="


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    """Pages with all that a page may have."""
    folder = tmp_path_factory.mktemp("every")
    texts = ["The\u00a0→  capital", "The capital\u00a0→  is", "Who?\u00a0→  I"]
    scores = replace(made_scores(blocks=3, dampings=("0.1", "1")), query_texts=texts)
    run, other = (
        saved(folder, "run", scores),
        saved(folder, "other", replace(made_scores(seed=1), query_texts=texts)),
    )
    beside = Beside([Answer(1.0, 0.1, known, "no") for known in (True, False, None)], ["row-1"] * 3,
                    columns={"kind": ["some"] * 30}, notes=("A note.",))  # fmt: skip
    of = {"query": {"tokens_of": [0, 0, 1]}}
    runs = [
        PageRun(replace(one.scores, settings=of), one.store, beside, command="gradfn") for one in (run, other)
    ]
    scatter = Scatter("run", [(10.0, 20.0)], 1.0, "1.0", "0.5", 1)
    write_page(runs, folder / "queries.html", scatters=[scatter], command="gradfn report")
    own = saved(folder, "own", made_scores(queries=1))
    own = replace(own.scores, values=own.scores.values.abs(), settings={"query": "self"})
    beside = Beside(labels=["a", "b"] * 15, predicted=lambda rows: dict.fromkeys(rows, "b"),
                    nearest=lambda row: [*range(30)], thumbnail=lambda row: PIXEL)  # fmt: skip
    write_page([PageRun(own, run.store, beside)], folder / "own.html")
    return folder


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["queries", "own"])
def test_all_text_stands_out(opened, every, name, scheme):
    page = opened(every / f"{name}.html", color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    page.keyboard.press("j")
    found = page.evaluate(CONTRAST)
    assert len(found) > 50
    assert [one for one in found if one[0] < 4.5] == []


@pytest.mark.parametrize("name", ["queries", "own"])
def test_controls_have_names_and_headings_their_order(opened, every, name):
    page = opened(every / f"{name}.html")
    assert page.evaluate(UNNAMED) == []
    levels = page.eval_on_selector_all(
        "h1, h2, h3, h4", "all => all.filter((h) => h.checkVisibility()).map((h) => Number(h.tagName[1]))"
    )
    assert levels[0] == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    for landmark in ("banner", "main", "contentinfo"):
        assert page.get_by_role(landmark).count() == 1, landmark
    assert page.get_by_role("navigation").count() == (name == "queries")
    assert page.get_attribute("html", "lang") == "en"
    assert page.locator("th:not([scope])").count() == 0
    assert page.locator("svg:not([aria-hidden]):not([aria-label]), img:not([alt])").count() == 0
    ids = page.eval_on_selector_all("[id]", "all => all.map((e) => e.id)")
    assert len({*ids}) == len(ids)
    assert page.locator("[tabindex]").count() == 0


@pytest.mark.parametrize("name", ["queries", "own"])
def test_the_tab_key_goes_down_the_page_and_what_has_the_focus_is_seen(opened, every, name):
    page = opened(every / f"{name}.html")
    expected = page.eval_on_selector_all(
        "a, button, input, select, summary", "all => all.filter((e) => e.checkVisibility()).length"
    )
    seen = []
    while True:
        page.keyboard.press("Tab")
        told = page.evaluate("""() => {
          const e = document.activeElement, style = getComputedStyle(e);
          const all = [...document.querySelectorAll("*")];
          return [all.indexOf(e), e.tagName, style.outlineStyle, parseFloat(style.outlineWidth)];
        }""")
        if told[1] == "BODY" or (seen and told[0] == seen[0][0]):
            break
        seen.append(told)
    places = [place for place, *_ in seen]
    assert places == sorted(places)
    assert len(places) == expected
    assert all(style == "solid" and width >= 2 for _, _, style, width in seen)


def test_single_keys_can_be_turned_off(opened, place):
    page = opened(place / "page.html")
    page.click(".keys summary")
    page.uncheck("#keyed")
    page.click("h1")
    page.keyboard.press("n")
    assert "#" not in page.url


def test_an_address_opens_its_query_and_row(opened, place):
    worst = Scores.load(place / "one").of_damping("0.1").matrix[:, 2].abs().argmin()
    page = opened(place / "page.html", f"#q2-r{int(worst)}")
    assert int(worst) in shown(page)
    assert page.get_attribute("li.row.now", "data-row") == str(int(worst))
    page.evaluate("location.hash = '#q0'")
    page.wait_for_function("document.querySelector('nav [aria-current]').hash === '#q0'")


def test_it_reads_without_scripts_on_a_narrow_screen_and_on_paper(opened, place):
    page = opened(place / "page.html", java_script_enabled=False)
    assert page.locator("section.query:visible").count() == 3
    assert page.locator("input:visible, select:visible").count() == 0
    page = opened(place / "page.html", color_scheme="dark")
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.emulate_media(media="print")
    assert page.locator("section.query:visible").count() == 3
    assert page.locator("nav:visible, .controls:visible").count() == 0


def test_hostile_text_does_not_run(opened, tmp_path):
    plain = [text.replace("\ud800", "").replace("\x00", "") for text in HOSTILE]
    run = saved(tmp_path, "run", made_scores(len(HOSTILE), len(HOSTILE)))
    scores = Scores(run.scores.values, plain, plain, query_texts=plain, name=plain[1])
    beside = Beside(
        [Answer(1.0, 0.1, False, text) for text in HOSTILE], plain, labels=HOSTILE, notes=HOSTILE,
        columns=dict.fromkeys(HOSTILE, HOSTILE),
    )  # fmt: skip
    write_page([PageRun(scores, run.store, beside, command=HOSTILE[0])], tmp_path / "page.html")
    page = opened(tmp_path / "page.html")
    for number in range(len(HOSTILE)):
        page.keyboard.press("j")
        page.keyboard.press("n")
        page.select_option("#order", ("high", "id")[number % 2])
        page.locator("h1").click()
    assert page.evaluate("window.pwned") is None
    assert page.locator("img").count() == 0
    assert page.locator("li.row:visible .id", has_text="<script>").count()


def test_decisions_are_exported(opened, tmp_path):
    run = saved(tmp_path, "run", made_scores(queries=1))
    own = Scores(
        run.scores.values.abs(), run.scores.row_ids, ["self"], settings={"query": "self"}, name="own"
    )
    write_page([PageRun(own, run.store)], tmp_path / "page.html")
    page = opened(tmp_path / "page.html")
    rows = shown(page)
    page.keyboard.press("j")
    page.keyboard.press("x")
    page.check(f'li[data-row="{rows[1]}"] input[name=wrong]')
    page.check(f'li[data-row="{rows[1]}"] input[name=right]')
    with page.expect_download() as download:
        page.click("#export")
    lines = [json.loads(line) for line in download.value.path().read_text().splitlines()]
    assert {line["id"]: line["decision"] for line in lines} == {
        f"row-{rows[0]}": "wrong",
        f"row-{rows[1]}": "right",
    }
    assert lines[0]["score"] == pytest.approx(float(own.values[0, lines[0]["row"], 0]), rel=1e-3)
    page.reload()
    assert page.is_checked(f'li[data-row="{rows[1]}"] input[name=right]')
    assert page.locator(".decide input:checked").count() == 2
    other = Scores(
        own.values, [f"other {name}" for name in own.row_ids], ["self"], settings=own.settings, name="own"
    )
    write_page([PageRun(other, run.store)], tmp_path / "page.html", overwrite=True)
    page.reload()
    assert page.locator(".decide input:checked").count() == 0
