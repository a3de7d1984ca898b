"""The page in a real Chromium: nothing goes wrong, tables sort and filter, plots show, nothing from a record runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sparse_lab.report import write

Make = Callable[..., Path]
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *(
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-dev-shm-usage",
        "--force-prefers-reduced-motion",
        "--window-size=1200,900",
    ),
)

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not CHROMIUM or not DRIVER, reason="needs Debian's packages chromium and chromium-driver"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    selenium = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install 'sparse_lab[full]'")
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def visit(browser: Any, tmp_path: Path) -> Callable[[Path], Any]:
    """Opens the report of these records in the browser, and sees that nothing was said on its console."""

    def go(root: Path) -> Any:
        browser.get_log("browser")
        browser.get(write([root], tmp_path / "out").page.as_uri())
        assert browser.get_log("browser") == []
        return browser

    return go


def column(browser: Any, name: str) -> list[str]:
    """The cells of a column of the big table that can be seen, from top to bottom."""
    script = """
        const heads = [...document.querySelectorAll('table.filtered thead th')].map((head) => head.textContent);
        const rows = [...document.querySelectorAll('table.filtered tbody tr')].filter((row) => row.offsetHeight > 0);
        return rows.map((row) => row.cells[heads.indexOf(arguments[0])].textContent);
    """
    return list(browser.execute_script(script, name))


def head(browser: Any, name: str) -> Any:
    return browser.find_element("xpath", f"//table[contains(@class, 'filtered')]//th[button[text()='{name}']]")


def several(make_run: Make) -> None:
    for seed in (1, 2):
        make_run(method="oneshot", sparsity=0.9, seed=seed, accuracy=9.5 + seed)
    make_run(method="oneshot", sparsity=0.999, accuracy=80.0, explored=0.5)
    make_run(method="east", sparsity=0.99, accuracy=100.0, dataset="cifar100", explored=0.25)
    make_run(method="dense", sparsity=0.0, accuracy=70.0, model="resnet34")


def test_a_click_on_a_head_sorts_by_number_and_back(
    make_run: Make, visit: Callable[[Path], Any], tmp_path: Path
) -> None:
    several(make_run)
    browser = visit(tmp_path)
    title = head(browser, "mean ± std")
    assert title.get_attribute("aria-sort") is None
    title.find_element("tag name", "button").click()
    assert column(browser, "mean ± std") == ["11.00 ± 0.71", "70.00", "80.00", "100.00"]
    assert title.get_attribute("aria-sort") == "ascending"
    title.find_element("tag name", "button").click()
    assert column(browser, "mean ± std") == ["100.00", "80.00", "70.00", "11.00 ± 0.71"]
    assert title.get_attribute("aria-sort") == "descending"
    head(browser, "kept").find_element("tag name", "button").click()
    assert column(browser, "kept") == ["921", "9,213", "92,134", "921,344"]
    assert title.get_attribute("aria-sort") is None
    for shown in (["25.0%", "50.0%", "", ""], ["50.0%", "25.0%", "", ""]):
        head(browser, "explored").find_element("tag name", "button").click()
        assert column(browser, "explored") == shown


def test_the_keyboard_sorts_too(make_run: Make, visit: Callable[[Path], Any], tmp_path: Path) -> None:
    several(make_run)
    browser = visit(tmp_path)
    button = head(browser, "method").find_element("tag name", "button")
    browser.execute_script("arguments[0].focus()", button)
    browser.switch_to.active_element.send_keys("\ue007")
    assert column(browser, "method") == ["dense", "east", "oneshot", "oneshot"]
    browser.switch_to.active_element.send_keys(" ")
    assert column(browser, "method") == ["oneshot", "oneshot", "east", "dense"]


def test_words_and_choices_filter(make_run: Make, visit: Callable[[Path], Any], tmp_path: Path) -> None:
    several(make_run)
    browser = visit(tmp_path)
    said = browser.find_element("css selector", "form.filters output")
    assert said.text == "4 of 4 cells"
    words = browser.find_element("name", "words")
    words.send_keys("Oneshot 99.9%")
    assert column(browser, "sparsity") == ["99.9%"] and said.text == "1 of 4 cells"
    words.clear()
    words.send_keys("o")
    for name, value, shown in (("dataset", "cifar10", 3), ("method", "oneshot", 2), ("model", "resnet34", 0)):
        browser.find_element("xpath", f"//select[@name='{name}']/option[text()='{value}']").click()
        assert len(column(browser, "method")) == shown and said.text == f"{shown} of 4 cells"


def test_plots_show(
    make_run: Make,
    put_lines: Callable[..., None],
    update: Callable[..., Any],
    visit: Callable[[Path], Any],
    tmp_path: Path,
) -> None:
    for seed in (1, 2):
        folder = make_run(method="east", seed=seed, seconds=60.0, layers=[{"name": "fc", "kept": 1, "total": 100}])
        put_lines(folder, "updates", [update(epoch) for epoch in range(5)])
        (folder / "metrics.csv").write_text("epoch,train_loss,validation_accuracy\n1,2,30\n2,1,60\n")
    browser = visit(tmp_path)
    widths = browser.execute_script(
        "return [...document.images].map((image) => [image.naturalWidth, image.offsetWidth])"
    )
    assert len(widths) == 5 and all(natural > 500 and shown > 300 for natural, shown in widths)


def test_nothing_from_a_record_runs(
    make_evil: Callable[[], Path], visit: Callable[[Path], Any], browser: Any, tmp_path: Path
) -> None:
    # What alert would have shown is kept instead, from before the page's first line.
    script = "window.ran = []; window.alert = (what) => window.ran.push(what);"
    added = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script})
    try:
        visit(make_evil())
        assert browser.execute_script("return window.ran") == []
        assert browser.execute_script("return document.scripts.length") == 1
        assert "<script>alert(1)</script>" in browser.find_element("css selector", "#panel-1 h2").text
        head(browser, "method").find_element("tag name", "button").click()
        browser.find_element("name", "words").send_keys("<script> onerror=alert(2)> tame")
        assert len(column(browser, "method")) == 1 and browser.execute_script("return window.ran") == []
        # The page's own policy would stop a script even if one got in.
        inject = "const s = document.createElement('script'); s.textContent = 'alert(4)'; document.body.append(s);"
        browser.execute_script(inject)
        assert browser.execute_script("return window.ran") == []
        [said] = browser.get_log("browser")
        assert "Content Security Policy" in said["message"]
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_follows_the_readers_light(
    make_run: Make, visit: Callable[[Path], Any], browser: Any, tmp_path: Path, scheme: str
) -> None:
    several(make_run)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    try:
        visit(tmp_path)
        brightness = """
            const of = (name) => getComputedStyle(document.body)[name].match(/\\d+/g).slice(0, 3).map(Number);
            return ['backgroundColor', 'color'].map((name) => of(name).reduce((a, b) => a + b) / 3);
        """
        ground, ink = browser.execute_script(brightness)
        assert (ground > 200 and ink < 80) if scheme == "light" else (ground < 60 and ink > 190)
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.parametrize("width", [400, 1300])
def test_the_page_itself_never_scrolls_sideways(
    make_run: Make, visit: Callable[[Path], Any], browser: Any, tmp_path: Path, width: int
) -> None:
    for share in (0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999, 0.9999):
        make_run(sparsity=share, model="a_network_with_a_very_long_name_that_has_no_place_to_break" * 2)
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        visit(tmp_path)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        boxes = "return [...document.querySelectorAll('.scroll')].some((box) => box.scrollWidth > box.clientWidth)"
        assert browser.execute_script(boxes)
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
