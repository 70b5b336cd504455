"""The report as a page: what it says first, where its links lead, what its pictures say, and that all can read it."""

import re

import pytest
from small_run import make_run
from test_access import findings

import utils


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """report.html of a small run."""
    import papermill
    from test_access import ROOT

    out = make_run(tmp_path_factory.mktemp("run"))
    done = out / "06_report.ipynb"
    given = {"DATA": str(out / "data"), "RUN": str(out), "OUT": str(out), "EXAMPLES": 2, "DRAWS": 50}
    papermill.execute_notebook(
        ROOT / "notebooks/06_report.ipynb", done, given, cwd=ROOT, kernel_name="python3", progress_bar=False
    )
    return utils.export_html(done, out / "report.html")


@pytest.fixture(scope="module")
def soup(report):
    from bs4 import BeautifulSoup

    return BeautifulSoup(report.read_text(encoding="utf-8"), "html.parser")


def test_the_summary_comes_first_and_leads_everywhere(soup):
    headings = [heading.get_text().rstrip("\N{PILCROW SIGN}") for heading in soup.select("h2")]
    assert headings[:2] == ["Summary", "Scores"] and headings[-1] == "Stages, parameters and versions"
    links = [link["href"].removeprefix("#") for link in soup.select("main a[href]:not(.anchor-link)")]
    ids = {heading["id"] for heading in soup.select("h2")}
    assert len(links) > 18 and set(links) == ids - {"Summary"}
    contents = [item.get_text() for item in soup.select("ol li")]
    assert contents == headings[1:]
    first = soup.find("table")
    assert [cell.get_text() for cell in first.select("tbody td:first-child")] == [
        "Test, 2 studies",
        "Out of fold, 6 studies",
    ]
    looks = [item.get_text() for item in soup.select("ul li") if "\N{RIGHTWARDS ARROW}" in item.get_text()]
    alarms = ["Look here." in text for text in looks]
    assert alarms == sorted(alarms, reverse=True) and any("below the class prior" in text for text in looks), looks
    doubt = next(text for text in looks if "second numbering" in text)
    assert "in doubt in 1 of 6 studies, with a second numbering in 1 (17%), which is 30% likely on average" in doubt
    assert "Look here." in doubt


def test_the_table_of_stages_is_the_last_section(soup):
    tables = [table.find("caption").get_text() if table.find("caption") else "" for table in soup.select("table.kit")]
    assert tables[-2].startswith("Stages") and tables[-1].startswith("Parameters")


def test_levels_have_their_second_numbering(soup):
    table = next(table for table in soup.select("table.kit") if "Second numbering" in table.get_text())
    names = [cell.get_text() for cell in table.select("th")]
    row = dict(zip(names, [cell.get_text() for cell in table.select("tbody tr")[0].select("td")], strict=True))
    assert (row["Second numbering, %"], row["its mean share, %"]) == ("16.7", "30.0")


def test_pictures_say_what_they_show(soup):
    texts = [picture.get("alt", "") for picture in soup.select("img")]
    assert len(texts) >= 7 and all(len(text) > 40 for text in texts) and len(set(texts)) == len(texts)
    assert not any(re.search(r"\.png|No description", text) for text in texts)
    assert any("held-out score best at epoch 2 with 0.600" in text for text in texts)


@pytest.mark.parametrize("screen, scheme", [("1280x720", "light"), ("1280x720", "dark"), ("200%", "light")])
def test_it_is_accessible(chromium, report, screen, scheme):
    assert findings(chromium, report, screen, scheme) == []


def test_it_fits_the_screen(chromium, report):
    page = chromium.new_page(viewport={"width": 640, "height": 360})
    page.goto(report.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 640
    page.locator("ol a", has_text="Levels").click()
    assert 0 <= page.locator("#Levels").bounding_box()["y"] < 100
    page.close()
