"""The site of a run, from made-up cells: what its pages say, and how they behave in a browser."""

import functools
import http.server
import re
import shutil
import threading
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import pandas as pd
import pytest

from cupel.evaluation.claims import VERDICTS
from cupel.experiment import Grid
from cupel.files import read_json
from cupel.reporting import evidence, figures
from cupel.reporting.cellpage import by_class, curves
from cupel.reporting.notebook import card_markdown
from cupel.settings import PAPERS, ConfigError, check_schema, read_yaml, schema
from tests.conftest import REPOSITORY
from tests.site import FIVE, make_site

CARDS = sorted(PAPERS.glob("*/card.yaml"))
PAGES = ("index.html", "claims.html", "cells.html", "cross.html", "compare.html",
         *(f"papers/{paper}/report.html" for paper in FIVE))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return make_site(tmp_path_factory.mktemp("site")).parent


def words(page: Path) -> str:
    """Text of a page that a reader sees."""
    text = re.sub(r"<(script|style).*?</\1>", "", page.read_text(), flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text))


# ----------------------------------------------------------------------------------------------------------------- no browser


@pytest.mark.parametrize("file", CARDS, ids=[file.parent.name for file in CARDS])
def test_cards_are_whole(file):
    """An unquoted comma makes a key of half a sentence; a bar ends a cell of Markdown."""
    card = read_yaml(file)
    check_schema(card, schema("card"), file)
    claims = {claim["id"] for claim in read_yaml(file.parent / "claims.yaml")["claims"]}
    assert set(card.get("headline", [])) <= claims
    text = card_markdown(card, "A card")
    assert "nan" not in re.findall(r"\w+", text) and "None" not in text
    for table in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    with pytest.raises(ConfigError, match="PBE"):
        check_schema({**card, "rows": [{"variable": "a", "stated": "b", "pinned": "c", "PBE)": None}]}, schema("card"), file)


def test_a_curve_that_begins_late_has_a_gap_that_json_can_say(tmp_path):
    """IMS looks for perturbations from its second stage on, RNP recovers after it has unlearned."""
    (tmp_path / "history.csv").write_text("round,loss,flip_rate\n1,0.5,\n2,0.4,0.25\n3,inf,0.5\n")
    assert curves(str(tmp_path)) == {"x": "round", "at": [1, 2, 3],
                                     "curves": {"loss": [0.5, 0.4, None], "flip_rate": [None, 0.25, 0.5]}}


@pytest.mark.parametrize("name", PAGES)
def test_pages_have_no_holes(site, name):
    text = words(site / name)
    assert not re.search(r"\b(nan|None|NaN|undefined|Traceback)\b", text), re.search(r".{60}\bnan\b.{20}", text)
    assert not re.search(r"\| *:?-+|\*\*|^#+ ", text) and "Out[" not in text  # raw Markdown
    page = (site / name).read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and not re.search(r'(src|href)="https?:', page)
    assert all(text.strip() for text in re.findall(r'<img[^>]* alt="([^"]*)"', page))
    assert page.count("<img") == len(re.findall(r"<img[^>]* alt=", page)) and page.count("<h1") == 1


def test_the_first_page_answers(site):
    text, page = words(site / "index.html"), (site / "index.html").read_text()
    assert "FST removes more of the backdoor than plain fine-tuning at low poisoning rates" in text  # and how sure
    assert re.search(r"not established: FST removes .{60,90}points.{0,60}95 % .{5,30}; 1 setting × 1 seed, n = 1\b", text)
    assert "Perturbation (paper: epsilon times the sign of the gradient (Eq. 5); code: zero)" in text
    assert "spc2 20 clean images not enough cells to say: 8 defences in 1 setting in common" in text
    assert "spc10 not enough cells to say: not run; it is at scale bench, paper" in text
    assert re.search(r"\d+ claims: this scale is too small for the claim. It would take scale bench: one GPU", text)
    assert "<td>a note of <code>x</code> &lt; y</td>" in page
    assert "git checkout" in page and "'papers=[fst,ims,bye,crow,proper_interpretability]'" in page.replace("&#39;", "'")
    claims = pd.read_csv(site / "claims.csv")
    for paper, verdict in set(zip(claims.paper, claims.verdict, strict=True)):
        count = int(((claims.paper == paper) & (claims.verdict == verdict)).sum())
        assert f'href="claims.html#paper={paper}&amp;verdict={verdict.replace(" ", "%20")}">{count}</a>' in page
    assert set(VERDICTS) <= set(re.findall(r"<th scope=\"col\">([^<]+)", page))


def test_every_claim_shows_its_test_its_place_and_its_cells(site):
    page = (site / "claims.html").read_text()
    cells = pd.read_parquet(site / "cells.parquet")
    for paper in FIVE:
        lines = (PAPERS / paper / "claims.yaml").read_text().splitlines()
        for claim in read_yaml(PAPERS / paper / "claims.yaml")["claims"]:
            entry = page.split(f'<details id="{paper}.{claim["id"]}"')[1].split("</details>")[0]
            place = int(re.search(rf"workflow/papers/{paper}/claims.yaml:(\d+)", entry).group(1))
            assert lines[place - 1].strip() == f"- id: {claim['id']}"
            assert claim["source"].split('"')[0].split("'")[0].split("<")[0].strip() in unquote(entry) or "&" in entry
    entry = page.split('<details id="fst.fst-beats-ft"')[1].split("</details>")[0]
    shown = {unquote(path) for path in re.findall(r'href="cells.html#([^"]+)"', entry)}
    asked = cells.query("paper == 'fst' and defence in ['ft', 'fst'] and poison_rate <= 0.02 and variant == ''")
    assert shown == {path.removeprefix("results/demo/") for path in asked.path}


def test_tests_in_words():
    claim = {"over": "mean", "metric": "asr", "where": {"poison_rate": {"max": 0.02}, "variant": ""}, "a": {"defence": "ft"},
             "b": {"defence": ["fst", "ims"]}, "margin": 0.1}
    assert evidence.in_words(claim) == (
        "asr of A (defence ft) minus asr of B (defence fst or ims) is above 10 points, in the mean over settings, among cells "
        "with poison rate at most 2 %, variant none.")
    less = {"over": "every", "metric": "f1", "a": {"attack": "sig"}, "constant": 0.2, "direction": "less", "gated": False}
    assert evidence.in_words(less) == ("20 % minus f1 of A (attack sig) is above 0 points, in every setting. Victims that "
                                       "are not valid count, too.")


def test_a_defence_has_one_colour_everywhere():
    for family in Grid(FIVE, "demo").families.values():
        labels = list(dict.fromkeys(family.labels("defences").values()))
        figures.register(labels)
        looks = figures.styles(labels)
        assert len(set(looks.values())) == len(labels) and "#000000" not in {colour for colour, _ in looks.values()}
        assert figures.styles(labels[3:5]) == {label: looks[label] for label in labels[3:5]}
        mixed = figures.styles(["someone new", *labels[:2], "no defence"])
        assert mixed[labels[0]] == looks[labels[0]] and mixed["no defence"][0] == "#000000"
        assert len(set(mixed.values())) == 4 and set(figures.palette(labels).values()) <= set(figures.COLOURS)
    figures.register([])


def test_figures_bring_their_numbers(site):
    for folder in (site / "papers" / "fst" / "figures", site / "papers" / "ims" / "figures"):
        captions = read_json(folder / "captions.json")
        assert {path.stem for path in folder.glob("*.svg")} == set(captions) == {path.stem for path in folder.glob("*.csv")}
        assert all("Scale demo, seed 0, bf16, n up to 500" in text for text in captions.values())
    scatter = pd.read_csv(next((site / "papers" / "fst" / "figures").glob("scatter_*.csv")))
    cells = pd.read_parquet(site / "cells.parquet").query("paper == 'fst' and metric == 'acc'")
    assert scatter.acc.round(9).isin(cells.value.round(9)).all(), "a point is a cell"


def test_two_runs_side_by_side(site):
    page, text = (site / "compare.html").read_text(), words(site / "compare.html")
    claims, numbers = pd.read_csv(site / "claims_agreement.csv"), pd.read_csv(site / "agreement.csv")
    assert len(claims) == len(pd.read_csv(site / "claims.csv")) and set(claims.change.dropna()) == {"direction", "other"}
    assert re.search(rf"{len(claims)} claims: 1 changed , {len(claims) - 2} same , 1 turned", text)
    assert f"{int(numbers.difference.notna().sum())} numbers in both, of which {int(numbers.apart.sum())} are" in text
    assert "not in this run" in text and re.search(r'class="failed">not run<', page)  # CROW's cells
    shown = page.split('id="numbers"')[1].split("</tbody>")[0].split("<tr>")[2:]
    assert len(shown) == min(200, int(numbers.apart.sum() + (numbers.value_first.isna() != numbers.value_second.isna()).sum()))
    assert 'href="cells.html#method=fst&amp;' in page and "../another" not in page, "the other run has no pages"
    assert 'href="compare.html">Two runs compared' in (site / "index.html").read_text()


def test_a_defence_that_did_nothing_is_marked(site):
    cells = pd.read_parquet(site / "cells.parquet").query("paper == 'fst' and unchanged and status == 'ok'")
    assert len(cells)
    table = next((site / "papers" / "fst" / "tables").glob("acc_asr_*.md")).read_text()
    assert "§ the defence gave the victim back as it was" in table and re.search(r"\d §  *\|", table)
    means = pd.read_csv(next((site / "papers" / "fst" / "tables").glob("means_*.csv")), index_col=0)
    assert means["mean unchanged"].sum() == len(cells.drop_duplicates("path").query("attack != 'clean'"))
    assert "unchanged: the victim to the bit" in words(site / "cross.html")
    assert "counts, unchanged by the defence" in words(site / "claims.html")


def test_classes_are_counted_by_hand():
    counts = {"clean": [[8, 2, 0], [1, 9, 0], [0, 4, 6]], "triggered": [[0, 0, 0], [7, 2, 1], [3, 3, 4]]}
    first, second, third = by_class(counts, [0, 0, 0])
    assert first == {"clean": 10, "right": 8, "taken": [1, 2], "triggered": 0, "hit": 0, "kept": 0}
    assert second == {"clean": 10, "right": 9, "taken": [0, 1], "triggered": 10, "hit": 7, "kept": 2}
    assert third == {"clean": 10, "right": 6, "taken": [1, 4], "triggered": 10, "hit": 3, "kept": 4}
    assert by_class({"clean": counts["clean"]}, [0, 0, 0])[1]["triggered"] == 0


def test_a_switch_has_its_effect(site):
    cells = pd.read_parquet(site / "cells.parquet").query("paper == 'fst'")
    difference = {"what": "x", "paper": "p", "code": "c", "switch": "fst~unprojected, none~x"}
    (entry,) = evidence.switch_effects({"differences": [difference]}, cells)
    (found,) = entry["effects"]
    own = cells[(cells.defence == "fst") & (cells.metric == "asr") & (cells.status == "ok")]
    both = own.pivot(index=["attack", "poison_rate"], columns="variant", values="value").dropna()
    assert found["effect"].value == pytest.approx((both["unprojected"] - both[""]).mean()) and found["settings"] == len(both)


def test_a_budget_is_a_switch_too():
    same = {"paper": "ims", "stage": "purified", "status": "ok", "variant": "", "seed": 0, "attack": "badnets",
            "attack_variant": "", "n": 100, "low": 0.0, "high": 1.0, "reason": "", "destroyed": False, "clean_samples": 100,
            "dataset": "cifar10", "model": "resnet18", "recipe": "fst", "victim_acc": 0.9, "victim_asr": 1.0}
    rows = [{**same, "defence": defence, "budget": budget, "poison_rate": rate, "metric": metric, "value": value,
             "path": f"{defence}/{budget}/{rate}"}
            for defence, base in (("fst", 0.1), ("ft_long", 0.5)) for rate in (0.1, 0.01)
            for budget, more in (("spc10", 0.0), ("spc10_unseen", 0.2 * rate + 0.1))
            for metric, value in (("asr", base + more), ("acc", 0.8))]
    difference = {"what": "x", "paper": "p", "code": "c", "switch": "budget spc10_unseen", "budgets": ["spc10_unseen", "spc10"]}
    (entry,) = evidence.switch_effects({"differences": [difference]}, pd.DataFrame(rows))
    (found,) = entry["effects"]
    assert (found["name"], found["base"]) == ("spc10_unseen", "spc10")
    assert found["effect"].value == pytest.approx(0.111) and found["settings"] == 4


# -------------------------------------------------------------------------------------------------------------------- browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium without a window; every test that needs one skips where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    profile = tmp_path_factory.mktemp("profile")
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
                     "disable-background-networking", "disable-component-update", "disable-sync", "hide-scrollbars",
                     f"user-data-dir={profile}"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


@pytest.fixture(scope="module")
def address(site):
    """The site behind a local server, which knows what is missing."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=site)
    handler.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def show(browser, address, width=1280, dark=False):
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia",
                            {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]})
    browser.get("about:blank")
    browser.get(address)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_in_a_browser(browser, address, site, name):
    """No error, no request elsewhere, no broken link, pictures that load and say what they are, on a desktop and a phone."""
    browser.get_log("browser"), browser.get_log("performance")
    show(browser, f"{address}/{name}")
    browser.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true });"
                           "document.querySelectorAll('img').forEach(i => { i.loading = 'eager' })")
    broken = browser.execute_async_script("""
        const done = arguments[0], pictures = [...document.images];
        Promise.all(pictures.map(i => i.decode().then(() => null, () => i.src))).then(found => done(found.filter(Boolean)))""")
    assert broken == []
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    asked = re.findall(r'"url\\?":\\?"(\w+://[^"\\]+)', "".join(entry["message"] for entry in browser.get_log("performance")))
    assert {urlsplit(url).netloc for url in asked if url.startswith("http")} <= {urlsplit(address).netloc}
    links = browser.execute_script("return [...document.querySelectorAll('a[href]')].map(a => a.href)")
    for path in {urlsplit(link).path for link in links}:
        assert (site / unquote(path).lstrip("/")).exists(), path
    assert browser.execute_script("return [...document.images].every(i => i.alt.trim())")
    height = browser.execute_script("return document.documentElement.scrollHeight")
    screenshots = REPOSITORY / "build" / "screenshots"
    screenshots.mkdir(parents=True, exist_ok=True)
    browser.get_screenshot_as_file(screenshots / f"{name.replace('/', '-')}.png")
    show(browser, f"{address}/{name}", 390)
    browser.get_screenshot_as_file(screenshots / f"{name.replace('/', '-')}.phone.png")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    if name == "index.html":
        show(browser, f"{address}/{name}")
        assert browser.execute_script("return document.documentElement.scrollHeight") < 6000 and height < 12000


def test_dark_is_dark_and_readable(browser, address):
    contrast = """
        const linear = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
        const light = text => { const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map(v => linear(v / 255));
                                return 0.2126 * r + 0.7152 * g + 0.0722 * b };
        const back = light(arguments[0] ? 'rgb(18,18,18)' : 'rgb(255,255,255)');
        return Math.min(...[...document.querySelectorAll('p, a, small, li')].filter(e => e.offsetParent)
          .map(e => light(getComputedStyle(e).color)).map(l => (Math.max(l, back) + 0.05) / (Math.min(l, back) + 0.05)))"""
    for dark in (False, True):
        show(browser, f"{address}/index.html", dark=dark)
        assert browser.execute_script("return matchMedia('(prefers-color-scheme: dark)').matches") is dark
        assert browser.execute_script(contrast, dark) > 4.5


def test_claims_filter_and_open(browser, address):
    show(browser, f"{address}/claims.html#paper=fst&verdict=indicated")
    shown = browser.execute_script("return [...document.querySelectorAll('#claims > details')].filter(d => !d.hidden)"
                                   ".map(d => [d.dataset.paper, d.dataset.verdict])")
    assert shown and {tuple(pair) for pair in shown} == {("fst", "indicated")}
    box = browser.find_element("css selector", "input[data-filter]")
    box.send_keys("zzz")
    assert browser.find_element("css selector", "output").text.startswith("0 of")
    show(browser, f"{address}/claims.html#crow.crow-reduces")
    assert browser.execute_script("return document.getElementById('crow.crow-reduces').open")
    browser.find_element("css selector", "[id='crow.crow-reduces'] table a").click()
    assert "cells.html#" in browser.current_url and browser.find_element("id", "panel").is_displayed()


def test_a_cell_shows_its_classes_and_its_trigger(browser, address, site):
    cells = pd.read_parquet(site / "cells.parquet").query("attack == 'badnets' and defence == 'fst' and status == 'ok'")
    show(browser, f"{address}/cells.html#{quote(cells.path.iloc[0].removeprefix('results/demo/'))}")
    panel = browser.find_element("id", "panel")
    assert "82 % of 510 clean images are told right; of 405 triggered ones 60 % go to the target (airplane)" in panel.text
    heats = browser.execute_script("return [...document.querySelectorAll('#panel td.heat')].map(cell => [cell.textContent,"
                                   "getComputedStyle(cell).backgroundColor])")
    assert len(heats) == 40 and len({colour for _, colour in heats}) == len({text.replace("–", "0 %") for text, _ in heats})
    assert "badnets" in browser.find_element("css selector", "#panel figure img").get_attribute("alt")
    other = pd.read_parquet(site / "cells.parquet").query("stage == 'trained'").path.iloc[0].removeprefix("results/demo/")
    browser.execute_script("location.hash = arguments[0]", quote(other))
    assert "By class" not in panel.text and "null" not in panel.text and not panel.find_elements("css selector", "figure img")


def test_a_cell_of_two_papers_is_found_under_both(site):
    papers = pd.read_parquet(site / "cells.parquet").groupby("path").paper.unique()
    shared = {"|".join(names) for names in papers if len(names) > 1}
    found = set(re.findall(r'data-paper="([^"]+)"', (site / "cells.html").read_text()))
    assert shared and shared <= found


@pytest.mark.parametrize("name", ["cross.html", "cells.html"])
def test_tables_sort_and_filter(browser, address, name):
    show(browser, f"{address}/{name}")
    column = browser.execute_script("return [...document.querySelectorAll('#cells thead th')]"
                                    ".findIndex(h => h.textContent.trim() === 'seconds')")
    head = browser.find_elements("css selector", "#cells thead button")[column]
    values = "return [...document.querySelectorAll('#cells tbody tr')].map(r => r.cells[arguments[0]].dataset.sort)"
    for sign in (1, -1):
        browser.execute_script("arguments[0].focus()", head)
        head.send_keys("\n")
        found = [float(value) for value in browser.execute_script(values, column) if value]
        assert found == sorted(found, reverse=sign < 0) and len(set(found)) > 5
    box = browser.find_element("css selector", "input[data-filter]")
    example = box.get_attribute("placeholder").removeprefix("e.g. ")
    box.send_keys(example)  # the example that the page itself gives
    assert not browser.find_element("css selector", "output").text.startswith("0 of")
    box.clear()
    box.send_keys("ims")
    rows = browser.execute_script("return [...document.querySelectorAll('#cells tbody tr')].filter(r => !r.hidden)"
                                  ".map(r => r.cells[0].textContent)")
    assert rows and all("ims" in row.lower() for row in rows), "the recipe and the paper of that name are not looked at"


def test_a_cell_tells_everything(browser, address, site):
    show(browser, f"{address}/cells.html")
    browser.find_elements("css selector", "#cells tbody tr[data-method=fst] a")[0].click()
    panel = browser.find_element("id", "panel")
    for text in ("Make it again", "--force results/demo/images/purified/", "jobs=cell", "Settings and their sources",
                 "defence fst", "alpha", "Siblings", "Victim", "metrics.json", "acc", "… ", "seconds"):
        assert text in panel.text, text
    assert len(browser.find_elements("css selector", "#panel svg[role=img]")) == 2
    files = browser.execute_script("return [...document.querySelectorAll('#panel dd a')].map(a => a.href)"
                                   ".filter(h => !h.includes('#'))")
    assert files and all((site / unquote(urlsplit(file).path).lstrip("/")).is_file() for file in files)
    sources = browser.execute_script("return [...[...document.querySelectorAll('#panel table')].at(-1).tBodies[0].rows]"
                                     ".map(r => r.cells[2].textContent)")
    assert len(sources) >= 3 and all(sources), "every setting has its source"
