"""Report pages: what they say, that hostile text stays text, and what a real browser makes of them."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from example_reports import (
    EVIL,
    KINDS,
    compare_report,
    eval_report,
    fix_report,
    hostile_inputs,
    hostile_report,
    model_score,
    module,
    names,
)

from csulora_cli import compare_wording, eval_wording, html, wording
from csulora_cli.report import PathRecord, StrengthRecord
from csulora_cli.text import printable

TESTS = Path(__file__).parent


class Page(HTMLParser):
    """Tags, attributes, texts and rows of tables of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.is_in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
            self.is_in_cell = True
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data.strip())
        if self.is_in_cell:
            self.rows[-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        if tag in ("th", "td"):
            self.is_in_cell = False

    def shows(self, table: wording.Table) -> bool:
        """Whether every row of a table is on the page, cell by cell."""
        return all([" ".join(cell.split()) for cell in row] in self.clean_rows for row in table.rows)

    @property
    def clean_rows(self) -> list[list[str]]:
        return [[" ".join(cell.split()) for cell in row] for row in self.rows]


# What a page says


def test_the_page_says_what_the_terminal_says() -> None:
    report = fix_report(warnings=("a warning",))
    page = Page(html.fix_page(report))
    texts = page.texts
    for line in [*wording.verdict(report), wording.VERIFIED, wording.behaviour_note(report), "a warning"]:
        assert line in texts
    for table in (wording.behaviour_table(report), wording.path_table(report), wording.module_table(report)):
        assert page.shows(table)
        assert set(filter(None, table.header)) <= set(texts)
    assert {"KL to host, harmful", "0.0615", "down_proj", "org/my-adapter", "0123456789abcdef" * 4} <= set(texts)
    assert "Done and verified" in texts
    assert report.modules[0].name in texts


def test_the_page_says_that_a_gate_failed() -> None:
    report = fix_report(strength=StrengthRecord(32.0, True, False, 0.01, 15.3, fix_report().strength.path))
    page = html.fix_page(report)
    assert "Finished, but a gate failed" in page
    assert "Not reached: no λ up to 32" in page
    assert "Done and verified" not in page


def test_a_repair_that_measured_no_behaviour_has_no_empty_sections() -> None:
    by_weights = [
        module(name, before={"along D": 0.3}, after={"along D": 0.1}, chance={"along D": 0.2}) for name in names(2)
    ]
    report = fix_report(
        behaviour={},
        strength=StrengthRecord(1.0, is_auto=False),
        modules=by_weights,
        settings={"source": "weights", "geometry": "keep-out"},
    )
    page = Page(html.fix_page(report))
    assert "No prompt was run: whether the repair restores refusals was not measured." in page.texts
    assert "Removed, along D" in page.texts
    assert "Before and after" not in page.texts
    assert page.tags.count("svg") == 2


def test_points_that_cannot_be_drawn_do_not_break_the_page() -> None:
    path = (PathRecord(0.0, 1.0, 1.0, 0.0), PathRecord(1.0, float("nan"), 0.0, 0.5))
    report = fix_report(strength=StrengthRecord(1.0, True, False, 0.0, 15.3, path))
    assert Page(html.fix_page(report)).tags.count("svg") == 2 + 2 + 3  # behaviour, path, modules


@pytest.mark.parametrize("repairs", [0, 1, 4])
def test_the_page_of_an_evaluation_says_what_the_terminal_says(repairs: int) -> None:
    report = eval_report(repairs)
    page = Page(html.eval_page(report))
    for line in [*eval_wording.verdict(report), *eval_wording.legend(report)]:
        assert line in page.texts
    (table,) = eval_wording.score_tables(report, width=9)
    assert page.shows(table)
    assert ("Prompt by prompt" in page.texts) == (repairs > 0)
    assert page.tags.count("svg") == 3
    without_task = [replace(model, score=replace(model.score, task=None)) for model in report.models]
    counts = {**report.prompt_counts, "task": 0}
    assert Page(html.eval_page(eval_report(repairs, models=without_task, prompt_counts=counts))).tags.count("svg") == 2


def test_the_page_of_a_comparison_says_what_the_terminal_says() -> None:
    report = compare_report(left_out={"another": "needs more"})
    page = Page(html.compare_page(report))
    for line in [*compare_wording.level_lines(report), *compare_wording.verdict(report)]:
        assert line in page.texts
    assert "Left out, since each needs more: another." in page.texts
    assert set(compare_wording.legend(report)) < set(page.texts)
    assert page.shows(compare_wording.point_table(report))
    for method in report.methods:
        assert page.texts.count(method.name) >= 1 + 4 + 1  # legend, table of points, table of methods
    assert page.tags.count("svg") == 1 + len(report.methods) + 2


def test_without_a_retention_there_is_no_plane_but_a_page() -> None:
    undefined = replace(model_score(1, 0), retention=replace(model_score(1, 0).retention, value=None))
    report = compare_report(host=undefined, adapter=undefined, points=(), levels=())
    page = Page(html.compare_page(report))
    assert any(text.startswith("What a repair keeps cannot be told") for text in page.texts)
    assert any(text.startswith("There is no picture") for text in page.texts)


# One self-contained text

HOSTILE_EVAL = eval_report(
    1,
    inputs=hostile_inputs("host", "adapter", "repaired", "prompts", "task", "judge"),
    settings={**eval_report().settings, "judge": EVIL, EVIL: EVIL},
    warnings=(EVIL,),
)
HOSTILE_COMPARE = compare_report(
    left_out={EVIL: EVIL},
    inputs=hostile_inputs("adapter", "host", "prompts", "unaligned", "task"),
    settings={**compare_report().settings, EVIL: EVIL},
    warnings=(EVIL,),
)
PAGES: dict[str, Callable[[], str]] = {
    "fix": lambda: html.fix_page(fix_report(names(28), warnings=("a warning",))),
    "fix, hostile": lambda: html.fix_page(hostile_report()),
    "fix, 210 modules": lambda: html.fix_page(fix_report(names(30))),
    "fix, long names": lambda: html.fix_page(
        fix_report([f"model.layers.{layer}.{kind * 8}" for layer in range(2) for kind in KINDS])
    ),
    "eval": lambda: html.eval_page(eval_report(2, warnings=("a warning",))),
    "eval, hostile": lambda: html.eval_page(HOSTILE_EVAL),
    "eval, many": lambda: html.eval_page(eval_report(9)),
    "compare": lambda: html.compare_page(compare_report(warnings=("a warning",))),
    "compare, hostile": lambda: html.compare_page(HOSTILE_COMPARE),
}
ALL_PAGES = pytest.mark.parametrize("name", PAGES)
COMMANDS = pytest.mark.parametrize("command", ["fix", "eval", "compare"])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    for name, page in PAGES.items():
        (folder / f"{name}.html").write_text(page(), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in PAGES}


@COMMANDS
def test_a_page_holds_no_script_and_no_address(command: str, files: dict[str, Path]) -> None:
    text = files[command].read_text(encoding="utf-8")
    page = Page(text)
    assert {"script", "link", "img", "iframe", "object", "form", "a"}.isdisjoint(page.tags)
    assert {"src", "href", "srcset", "action", "id"}.isdisjoint(name for name, _ in page.attributes)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "url(" not in text


@ALL_PAGES
def test_a_page_is_known_by_its_head_and_stays_small(name: str, files: dict[str, Path]) -> None:
    data = files[name].read_bytes()
    assert html.MARK.encode() in data[:1000]
    assert len(data) < 250_000


def test_the_page_of_the_largest_models_stays_below_a_megabyte() -> None:
    assert 250_000 < len(html.fix_page(fix_report(names(126))).encode()) < 1e6


def test_every_process_writes_the_same_bytes() -> None:
    code = "import sys; from example_reports import *; from csulora_cli import html; "
    code += (
        "text = html.fix_page(hostile_report()) + html.eval_page(eval_report()) + html.compare_page(compare_report()); "
    )
    code += "sys.stdout.buffer.write(text.encode())"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "SOURCE_DATE_EPOCH": "12345"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=True, timeout=120)
    text = html.fix_page(hostile_report()) + html.eval_page(eval_report()) + html.compare_page(compare_report())
    assert done.stdout.decode() == text


@COMMANDS
def test_hostile_text_stays_text(command: str, files: dict[str, Path]) -> None:
    text = files[f"{command}, hostile"].read_text(encoding="utf-8")
    page, harmless = Page(text), Page(files[command].read_text(encoding="utf-8"))
    assert set(page.tags) == set(harmless.tags)
    assert {name for name, _ in page.attributes} == {name for name, _ in harmless.attributes}
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", text)
    assert "<img" not in text
    assert text.count("{{7*7}}") > 10


# A real browser


@dataclass(frozen=True)
class Browser:
    """Chromium, and what it did since the last page."""

    driver: Any

    def open(self, file: Path, width: int = 1200, scheme: str = "light") -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get("about:blank")
        self.console()
        self.requests()
        self.driver.get(file.as_uri())

    def run(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def console(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    chromium, driver_path = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver_path is None:
        reason = "no chromium and chromedriver here (Debian: apt install chromium chromium-driver)"
        if os.environ.get("CI", "").lower() in ("true", "1"):
            pytest.fail(reason)
        pytest.skip(reason)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    switches = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    switches += " disable-component-update disable-sync disable-dev-shm-usage"
    for switch in switches.split():
        options.add_argument(f"--{switch}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(driver_path))
    yield Browser(driver)
    driver.quit()


OVERLAPS = """
  const found = [];
  for (const svg of document.querySelectorAll("svg")) {
    const frame = svg.getBoundingClientRect();
    const boxes = [...svg.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()]);
    boxes.forEach(([text, box], index) => {
      if (box.left < frame.left - 1 || box.right > frame.right + 1) found.push("cut off: " + text);
      if (box.top < frame.top - 1 || box.bottom > frame.bottom + 1) found.push("cut off: " + text);
      for (const [other, next] of boxes.slice(index + 1)) {
        const across = Math.min(box.right, next.right) - Math.max(box.left, next.left);
        const down = Math.min(box.bottom, next.bottom) - Math.max(box.top, next.top);
        if (across > 1 && down > 3) found.push(text + " over " + other);  // line boxes are higher than digits
      }
    });
  }
  return found;
"""
CONTRAST = """
  const style = getComputedStyle(document.documentElement);
  const canvas = document.createElement("canvas").getContext("2d");
  const light = name => {
    canvas.fillStyle = style.getPropertyValue("--" + name);
    const parts = canvas.fillStyle.match(/[0-9a-f]{2}/g).map(part => parseInt(part, 16) / 255);
    const [r, g, b] = parts.map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  return arguments[0].map(([above, below]) => {
    const [high, low] = [light(above), light(below)].sort((a, b) => b - a);
    return (high + 0.05) / (low + 0.05);
  });
"""


@ALL_PAGES
def test_a_page_opens_without_a_complaint_and_without_a_request(
    name: str, browser: Browser, files: dict[str, Path]
) -> None:
    browser.open(files[name])
    assert browser.console() == []
    assert browser.requests() == [files[name].as_uri()]
    assert browser.run("return document.contentType") == "text/html"
    sizes = browser.run(
        "return [...document.querySelectorAll('svg')]"
        ".map(svg => [svg.clientWidth, svg.clientHeight, svg.querySelectorAll('path').length])"
    )
    assert sizes
    assert all(width > 30 and height > 10 and paths > 0 for width, height, paths in sizes), sizes


@ALL_PAGES
@pytest.mark.parametrize("width", [375, 1200])
def test_a_page_fits_the_window_and_what_is_wider_scrolls_by_itself(
    name: str, width: int, browser: Browser, files: dict[str, Path]
) -> None:
    browser.open(files[name], width)
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.run("return innerWidth") == width
    assert browser.run("const page = document.documentElement; return page.scrollWidth - page.clientWidth") == 0
    wide = browser.run(
        "return [...document.querySelectorAll('.scroll')].filter(b => b.scrollWidth > b.clientWidth).length"
    )
    assert wide > 0 or width > 375


@ALL_PAGES
def test_no_text_in_a_picture_is_cut_off_or_overlaps(name: str, browser: Browser, files: dict[str, Path]) -> None:
    browser.open(files[name])
    assert browser.run(OVERLAPS) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_is_readable_light_and_dark(scheme: str, browser: Browser, files: dict[str, Path]) -> None:
    browser.open(files["fix"], scheme=scheme)
    background = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    pairs = [("ink", "paper"), ("muted", "paper"), ("accent", "paper"), ("ink", "heat"), ("ink", "panel")]
    pairs += [("good", "panel"), ("bad", "panel"), ("second", "paper")]
    ratios = browser.driver.execute_script(CONTRAST, pairs)
    assert min(ratios) >= 4.5, dict(zip(pairs, ratios, strict=True))
    used = browser.run(
        "return [...new Set([...document.querySelectorAll('svg text')].map(t => getComputedStyle(t).fill))]"
    )
    assert len(used) == 2
    assert "rgb(0, 0, 0)" not in used


@COMMANDS
def test_hostile_text_becomes_neither_markup_nor_script(command: str, browser: Browser, files: dict[str, Path]) -> None:
    browser.open(files[f"{command}, hostile"])
    assert browser.run("return document.querySelectorAll('img, script, a, iframe, [onerror]').length") == 0
    assert browser.run("return document.title") == f"{printable(EVIL, 2000)}: csulora {command}"
    assert browser.run("return document.querySelector('h1').textContent") == printable(EVIL, 2000)
    assert browser.run("return document.querySelector('main > footer') !== null")
    if command == "fix":
        labels = browser.run("return [...document.querySelectorAll('svg text')].map(t => t.textContent)")
        assert labels.count(printable(EVIL, 28)) == 3
