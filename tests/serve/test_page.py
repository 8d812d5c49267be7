"""The page in a real browser: used as a person would, and compared with the runtime."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT
from support.web.browser import browser, look, wait_for
from support.web.serving import Served, inside, png

import internvl_edge
from internvl_edge.errors import UsageError
from internvl_edge.runtime.model import Model
from internvl_edge.runtime.text.templates import Turn

STATIC = ROOT / "src" / "internvl_edge" / "serve" / "static"
LABELS = ["seven", "two", "a blue three"]
KEY = "a-key-of-the-tests"
COUNT = 5


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(COUNT):
        (folder / f"{i}.png").write_bytes(png(i))
    return folder


@pytest.fixture(scope="module")
def shown(compiled: Path, pictures: Path) -> Iterator[Served]:
    places = {"one": compiled, "other": compiled}
    with inside(places, gallery=pictures) as running:
        yield running


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


def visit(driver: Any, served: Served) -> None:
    """Open the page, and forget what was logged before."""
    driver.get("about:blank")
    driver.get_log("browser")
    driver.get_log("performance")
    driver.get(served.url)
    wait_for(driver, lambda d: find(d, "body").get_attribute("data-ready"))


def find(driver: Any, selector: str) -> Any:
    return driver.find_element("css selector", selector)


def every(driver: Any, selector: str) -> list[Any]:
    found: list[Any] = driver.find_elements("css selector", selector)
    return found


def upload(driver: Any, *paths: Path) -> None:
    before = len(every(driver, "#strip li"))
    find(driver, "#file").send_keys("\n".join(map(str, paths)))
    wait_for(driver, lambda d: len(every(d, "#strip li")) == before + len(paths))


def fill(driver: Any, selector: str, text: str) -> None:
    field = find(driver, selector)
    field.clear()
    field.send_keys(text)


def ask(driver: Any, text: str) -> str:
    """Ask a question, and return the whole answer."""
    before = len(every(driver, ".said .note"))
    find(driver, "#question").send_keys(text + "\n")
    wait_for(driver, lambda d: len(every(d, ".said .note")) == before + 1)
    script = (
        "return [...document.querySelectorAll('.assistant')].at(-1).lastChild.previousSibling.data"
    )
    said: str = driver.execute_script(script)
    return said


def console(driver: Any) -> list[str]:
    return [entry["message"] for entry in driver.get_log("browser")]


def hosts(driver: Any) -> set[str]:
    """Where the page's requests went."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [event for event in events if event["method"] == "Network.requestWillBeSent"]
    urls = {event["params"]["request"]["url"] for event in sent}
    network = {url for url in urls if not url.startswith(("data:", "blob:", "about:"))}
    return {url.split("/")[2] for url in network}


# --- what it is ----------------------------------------------------------------------------------


def test_it_is_small_and_needs_nobody() -> None:
    files = {path.name: path.read_bytes() for path in STATIC.iterdir()}
    page = [data for name, data in files.items() if name != "openapi.json"]
    assert sum(map(len, page)) < 30_000
    for name in ("page.html", "page.js", "page.css"):
        assert b"//" not in files[name].replace(b"http://www.w3.org", b"").replace(b"// ", b"")
        for unsafe in (b"innerHTML", b"insertAdjacentHTML", b"document.write", b"eval(", b"style="):
            assert unsafe not in files[name]


def test_its_policy_is_strict(shown: Served) -> None:
    reply = shown.ask("/")
    policy = reply.headers["content-security-policy"]
    assert policy == (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    assert reply.headers["x-content-type-options"] == "nosniff"
    kinds = {"/page.js": "text/javascript", "/page.css": "text/css", "/favicon.svg": "image/svg"}
    for path, kind in kinds.items():
        assert shown.ask(path).headers["content-type"].startswith(kind)


# --- as a person uses it -------------------------------------------------------------------------


@pytest.mark.slow
def test_a_visit(opened: Any, shown: Served, pictures: Path, model: Model) -> None:
    visit(opened, shown)
    upload(opened, pictures / "0.png")
    fill(opened, "#labels", ", ".join(LABELS))
    find(opened, "#classify-form .primary").click()
    wait_for(opened, lambda d: len(every(d, ".panel")) == 2)
    (expected,) = model.classify([png(0)], LABELS)
    for panel in every(opened, ".panel"):
        bars = every(panel, ".bars li")
        assert [bar.get_attribute("data-label") for bar in bars] == [e["label"] for e in expected]
        for bar, one in zip(bars, expected, strict=True):
            assert float(bar.get_attribute("data-score")) == pytest.approx(one["score"], abs=1e-6)
            assert f"{100 * one['score']:.1f} %" in bar.text
        assert "image embed" in panel.text
        assert "round trip" in panel.text
    assert ask(opened, "what is it?") == model.chat(png(0), "what is it?", max_new_tokens=64).text
    fill(opened, "#query", "a red seven\n")
    wait_for(opened, lambda d: len(every(d, "#hits li")) == COUNT)
    find(opened, "#alike").click()
    wait_for(opened, lambda d: "1.000" in find(d, "#hits li").text)
    find(opened, "#hits button").click()
    wait_for(opened, lambda d: len(every(d, "#strip li")) == 2)
    assert hosts(opened) == {f"{shown.host}:{shown.port}"}
    assert console(opened) == []


@pytest.mark.slow
def test_differences_between_models_are_marked(
    opened: Any, shown: Served, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shown.service.models["other"]
    weights = other.label_weights

    async def turned(*given: Any) -> Any:
        return (await weights(*given))[::-1]

    monkeypatch.setattr(other, "label_weights", turned)
    visit(opened, shown)
    upload(opened, pictures / "0.png")
    fill(opened, "#labels", "seven, two")
    find(opened, "#classify-form .primary").click()
    wait_for(opened, lambda d: len(every(d, ".panel")) == 2)
    first, second = every(opened, ".panel")
    assert every(first, ".diff") == []
    marks = [mark.text for mark in every(second, ".diff")]
    scores = [float(bar.get_attribute("data-score")) for bar in every(first, ".bars li")]
    change = 100 * (scores[0] - scores[1])
    assert marks == ["another best label", f"+{change:.1f}", f"−{change:.1f}"]


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1440])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits(opened: Any, shown: Served, pictures: Path, width: int, dark: bool) -> None:
    """No line is cut, and text can be read on what is behind it."""
    visit(opened, shown)
    look(opened, width, dark=dark)
    upload(opened, pictures / "0.png", pictures / "1.png")
    find(opened, "#classify-form .primary").click()
    wait_for(opened, lambda d: len(every(d, ".panel")) == 2)
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width
    for selector in ("body", ".muted", ".primary", ".chip", ".num", ".card h2"):
        assert contrast(opened, selector) >= 4.5, selector


CONTRAST = """
const element = document.querySelector(arguments[0]);
const parts = (text) => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
  .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
let under = element;
const ground = (e) => parts(getComputedStyle(e).backgroundColor);
while (under && ground(under)[3] === 0) under = under.parentElement;
const [a, b] = [light(parts(getComputedStyle(element).color)), light(ground(under))];
return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
"""


def contrast(driver: Any, selector: str) -> float:
    """Compute the contrast of a text, as WCAG does."""
    ratio: float = driver.execute_script(CONTRAST, selector)
    return ratio


@pytest.mark.slow
def test_a_conversation_about_two_pictures(
    opened: Any, compiled_chat: Path, pictures: Path
) -> None:
    """A chat model sees every picture once, and what was said before."""
    with inside({"talk": compiled_chat}) as served, internvl_edge.load(compiled_chat) as talker:
        answering = served.service.models["talk"].model
        # An untrained model goes on until there is no room for a second question.
        answering.chat_stream = partial(answering.chat_stream, max_new_tokens=40)
        visit(opened, served)
        assert not find(opened, "#classify").is_displayed()
        upload(opened, pictures / "0.png", pictures / "1.png")
        both = [png(0), png(1)]
        first = ask(opened, "what are these?")
        reply = talker.chat(both, "<image>\n<image>\nwhat are these?", max_new_tokens=40)
        assert first == reply.text
        second = ask(opened, "are you sure?")
        history = [Turn(question="<image>\n<image>\nwhat are these?", answer=first)]
        assert second == talker.chat(both, "are you sure?", history, max_new_tokens=40).text
        find(opened, "#new").click()
        assert every(opened, ".said") == []
        assert console(opened) == []


@pytest.mark.slow
def test_text_is_text(opened: Any, shown: Served, pictures: Path) -> None:
    """Neither a label nor a question is taken for HTML."""
    visit(opened, shown)
    upload(opened, pictures / "0.png")
    evil = "<img src=x onerror=document.title=1>"
    fill(opened, "#labels", f"two, {evil}")
    find(opened, "#classify-form .primary").click()
    wait_for(opened, lambda d: len(every(d, ".panel")) == 2)
    assert evil in find(opened, ".panel").text
    ask(opened, evil)
    assert evil in find(opened, ".user").text
    assert opened.title == "internvl-edge"
    assert console(opened) == []


def refusing(*_: Any, **__: Any) -> Any:
    raise UsageError("not today")


@pytest.mark.slow
def test_errors_are_said_and_the_keyboard_is_enough(
    opened: Any, shown: Served, pictures: Path
) -> None:
    from selenium.webdriver.common.keys import Keys

    visit(opened, shown)
    find(opened, "#template").send_keys(Keys.ENTER)
    notice = wait_for(opened, lambda d: (n := find(d, "#notice")).is_displayed() and n)
    assert notice.text == "Choose a picture first."
    assert notice.get_attribute("role") == "alert"
    upload(opened, pictures / "0.png")
    served = shown.service.models["one"].model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served, "chat_stream", refusing)
        find(opened, "#question").send_keys("how many?\n")
        wait_for(opened, lambda d: "not today" in find(d, "#notice").text)
        wait_for(opened, lambda d: find(d, "#question").get_attribute("value") == "how many?")
        assert every(opened, ".said") == []  # as if it had not been asked
    fill(opened, "#template", "no place")
    find(opened, "#template").send_keys(Keys.ENTER)
    wait_for(opened, lambda d: "expected one {} or {c}" in find(d, "#notice").text)
    fill(opened, "#template", "a {}")
    find(opened, "#template").send_keys(Keys.TAB)
    assert opened.switch_to.active_element.text == "Classify"
    opened.switch_to.active_element.send_keys(Keys.SPACE)
    wait_for(opened, lambda d: len(every(d, ".panel")) == 2)
    for selector in ("#panels", "#log", "#hits"):
        assert find(opened, selector).get_attribute("aria-live") == "polite"
    unnamed = opened.execute_script(
        "return [...document.querySelectorAll('input, textarea, select')]"
        ".filter((e) => !e.labels.length).map((e) => e.id)"
    )
    assert unnamed == []


@pytest.mark.slow
def test_a_key_is_asked_for_and_kept_for_the_session(
    opened: Any, compiled: Path, pictures: Path, model: Model
) -> None:
    with inside({"tiny": compiled}, keys=(KEY,)) as served:
        opened.get(served.url)
        field = wait_for(opened, lambda d: (k := find(d, "#key")).is_displayed() and k)
        field.send_keys("wrong-key-of-the-tests\n")
        wait_for(opened, lambda d: "expected a key" in find(d, "#notice").text)
        fill(opened, "#key", f"{KEY}\n")
        wait_for(opened, lambda d: find(d, "body").get_attribute("data-ready"))
        assert not find(opened, "#key-form").is_displayed()
        upload(opened, pictures / "0.png")
        assert (
            ask(opened, "what is it?") == model.chat(png(0), "what is it?", max_new_tokens=64).text
        )
        opened.refresh()
        wait_for(opened, lambda d: find(d, "body").get_attribute("data-ready"))
        assert opened.execute_script("return localStorage.length") == 0
        opened.execute_script("sessionStorage.clear()")


@pytest.mark.slow
def test_what_the_server_does_not_take_is_drawn_anew(
    opened: Any, shown: Served, tmp_path: Path
) -> None:
    """A GIF is shown by the browser, and sent as a JPEG; what is no picture is said."""
    from PIL import Image

    Image.new("P", (40, 30), 3).save(tmp_path / "a.gif")
    (tmp_path / "b.png").write_text("no picture")
    visit(opened, shown)
    upload(opened, tmp_path / "a.gif")
    script = "return document.querySelector('#preview').src.slice(0, 15)"
    assert opened.execute_script(script) == "data:image/jpeg"
    find(opened, "#classify-form .primary").click()
    wait_for(opened, lambda d: len(every(d, ".panel")) == 2)
    upload(opened, tmp_path / "b.png")
    find(opened, "#classify-form .primary").click()
    wait_for(opened, lambda d: "expected a JPEG, PNG or WebP" in find(d, "#notice").text)
