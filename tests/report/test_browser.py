"""The page in headless Chromium: nothing leaves, hostile text does not run, keys and filter work."""

import json
import shutil

import pytest
from pages import HOSTILE, made_scores, saved

from gradfn.hf.answers import Answer
from gradfn.report.page import Beside, PageRun, write_page
from gradfn.scores import Scores

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
    page.select_option("#run", "1")
    assert len(shown(page)) == 10
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before


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
    assert page.locator("input:checked").count() == 2
    other = Scores(
        own.values, [f"other {name}" for name in own.row_ids], ["self"], settings=own.settings, name="own"
    )
    write_page([PageRun(other, run.store)], tmp_path / "page.html", overwrite=True)
    page.reload()
    assert page.locator("input:checked").count() == 0
