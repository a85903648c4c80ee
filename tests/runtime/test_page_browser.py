"""The report page as people meet it, in a real browser: with scripts and without, on paper, in the dark, on a phone."""

import os
import platform
from dataclasses import replace

import pytest
from PIL import Image

from forgedit.cli import main
from forgedit.quality.page import write_page
from tests.browser import find_browser, running_browser
from tests.runtime.pages import FIRST, ORIGINAL, SECOND, THIRD, hostile_page

SLIDER = "Share of the original that is shown, from the left"
EVERYTHING = "[...document.querySelectorAll('h1, h2, h3, p, q, li, dt, dd, figcaption, img, pre, th, td')]"
# by WCAG 2: of every element that holds words itself, their contrast to what lies behind them; the least, and where
CONTRAST = """(() => {
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map((part) => part / 255)
      .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    const colour = getComputedStyle(element).backgroundColor;
    return colour === 'rgba(0, 0, 0, 0)' && element.parentElement ? behind(element.parentElement) : colour;
  };
  const worded = [...document.querySelectorAll('body *')].filter((element) => element.checkVisibility()
    && !element.matches('script, option, .unseen')
    && [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
  return worded.map((element) => {
    const [one, two] = [light(getComputedStyle(element).color), light(behind(element))];
    return [(Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05), element.outerHTML.slice(0, 80)];
  }).sort((one, two) => one[0] - two[0])[0];
})()"""


def must_have_browser() -> bool:
    """Where .ci/run installs it, its absence is a failure."""
    if os.environ.get("CI") != "true" or os.geteuid() != 0:
        return False
    try:
        return platform.freedesktop_os_release()["ID"] == "debian"
    except OSError:  # no such file: not a Debian
        return False


@pytest.fixture(scope="module")
def browser():
    program = find_browser()
    if program is None:
        assert not must_have_browser(), "no browser, though .ci/run installs chromium-headless-shell here"
        pytest.skip("no Chromium on this machine; on Debian: apt-get install chromium-headless-shell")
    with running_browser(program) as browser:
        yield browser


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    write_page(folder / "page.html", hostile_page(folder))
    return folder / "page.html"


@pytest.fixture(scope="module")
def demo(model, tmp_path_factory):
    """The page of a real run of twelve edits."""
    folder = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--out", str(folder), "--model", str(model), "--threads", "1"]) == 0
    return folder / "page.html"


@pytest.fixture(params=["hostile", "demo"])
def page(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def tab(browser, hostile):
    """The hostile page, 1000 by 800 pixels, scripts allowed."""
    with browser.tab() as tab:
        tab.resize(1000, 800)
        tab.open(hostile.as_uri())
        yield tab


def box(tab, selector):
    """Left, top, width, height on the window, CSS pixels."""
    found = tab.value(f"document.querySelector('{selector}').getBoundingClientRect().toJSON()")
    return [found[name] for name in ("x", "y", "width", "height")]


def colours(tab, path, *shares):
    """What is seen on the picture's middle line at shares of its width."""
    left, top, width, height = box(tab, ".compare input")
    down = tab.value("scrollY")
    tab.screenshot(path)
    with Image.open(path) as shot:
        return [shot.convert("RGB").getpixel((left + share * width, down + top + 0.2 * height)) for share in shares]


def near(colour, other):
    return max(abs(one - two) for one, two in zip(colour, other, strict=True)) <= 2


@pytest.mark.parametrize("scripted", [True, False], ids=["scripts", "no scripts"])
def test_nothing_is_asked_for_and_nothing_complained_of(browser, page, scripted):
    with browser.tab(scripted) as tab:
        tab.open(page.as_uri())
        assert (tab.requests, tab.complaints) == ([page.as_uri()], [])
        assert tab.value("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
        assert tab.value("document.documentElement.classList.contains('js')") is scripted


def test_hostile_words_make_no_elements(tab):
    assert tab.value("document.querySelectorAll('script, style').length") == 2
    assert tab.value("document.images.length") == 7  # original, edit, mask, heat and three edits
    assert tab.value("document.querySelector('h1').textContent").startswith("a striped bird </style></script><script>")


@pytest.mark.parametrize(
    "smuggled",
    [
        "<script>document.title = 'taken'</script>",
        "<img src='data:,' onerror='document.title = &quot;taken&quot;'>",
        "<style>h1 { color: rgb(1, 2, 3) }</style>",
        "<p style='color: red'>",
        "<img src='http://127.0.0.1:9/seen.png'>",
        "<link rel='stylesheet' href='http://127.0.0.1:9/seen.css'>",
        "<iframe src='http://127.0.0.1:9/'></iframe>",
        "<base href='http://127.0.0.1:9/'>",
    ],
    ids=["script", "handler", "style", "attribute", "picture", "sheet", "frame", "base"],
)
def test_the_policy_refuses_what_escaping_would_let_through(browser, hostile, tmp_path, smuggled):
    """As if a word had not been escaped: the page's second wall, which says so on the console."""
    place = tmp_path / "page.html"
    place.write_text(hostile.read_text("utf-8").replace("<main>", f"<main>{smuggled}", 1), "utf-8")
    with browser.tab() as tab:
        tab.open(place.as_uri())
        assert any("Content Security Policy" in complaint for complaint in tab.complaints)
        assert not tab.value("document.title.startsWith('taken')")
        assert tab.value("getComputedStyle(document.querySelector('h1')).color") != "rgb(1, 2, 3)"
        answered = tab.value("performance.getEntriesByType('resource').map((entry) => entry.responseStatus)")
        assert not any(answered)
        assert tab.value("document.documentElement.classList.contains('js')")  # its own script still runs


def test_the_slider_by_mouse(tab, tmp_path):
    left, top, width, height = box(tab, ".compare input")
    assert [round(side) for side in box(tab, ".before img")] == [round(side) for side in (left, top, width, height)]
    one, other = colours(tab, tmp_path / "middle.png", 0.4, 0.6)
    assert near(one, ORIGINAL) and near(other, SECOND)
    middle = top + height / 2
    tab.drag((left + width / 2, middle), (left + 0.6 * width, middle), (left + 0.2 * width, middle))
    assert float(tab.value("document.querySelector('.compare input').value")) == pytest.approx(20, abs=0.5)
    edge, one, other = colours(tab, tmp_path / "left.png", 0.1, 0.25, 0.9)
    assert near(edge, ORIGINAL) and near(one, SECOND) and near(other, SECOND)


def test_the_slider_by_keyboard(tab, tmp_path):
    tab.press("Tab")
    assert tab.value("document.activeElement.getAttribute('aria-label')") == SLIDER
    for key, value in (("ArrowRight", 51), ("ArrowLeft", 50), ("ArrowLeft", 49), ("End", 100), ("Home", 0)):
        tab.press(key)
        assert float(tab.value("document.activeElement.value")) == value
    assert all(near(colour, SECOND) for colour in colours(tab, tmp_path / "edit.png", 0.1, 0.9))


def test_what_a_screen_reader_is_told(tab):
    told = tab.accessible()
    assert ("slider", SLIDER) in told
    assert tab.value("document.querySelector('.compare input').ariaValueText") == "50 % original, the rest second"
    pictures = [name for role, name in told if role == "image"]
    assert len(pictures) == 7 and all(pictures)
    assert not [role for role, name in told if role in ("button", "combobox", "slider", "image") and not name]
    headings = [name for role, name in told if role == "heading"]
    assert {"The edit", "Where it changed", "All 3 edits", "To make it again", "Time"} <= set(headings)


def test_an_edit_of_the_grid_is_laid_over_the_original(tab, tmp_path):
    assert tab.value("document.querySelector('.back').hidden")
    tab.click(".grid li:nth-child(3) button")
    assert near(colours(tab, tmp_path / "third.png", 0.9)[0], THIRD)
    assert tab.value("document.querySelector('.after figcaption').textContent") == "third"
    assert tab.value("document.activeElement.ariaValueText") == "50 % original, the rest third"  # the slider has focus
    tab.click(".back button")
    assert near(colours(tab, tmp_path / "back.png", 0.9)[0], SECOND)
    assert tab.value("document.querySelector('.back').hidden")
    tab.value("document.querySelector('.grid li button').focus()")
    tab.press("Enter")
    assert near(colours(tab, tmp_path / "first.png", 0.9)[0], FIRST)
    assert near(colours(tab, tmp_path / "first.png", 0.1)[0], ORIGINAL)


def test_the_grid_is_sorted_by_a_score(tab):
    order = "[...document.querySelectorAll('.grid h3')].map((title) => title.textContent.split(' ')[0])"
    assert tab.value(order) == ["first", "second", "third"]
    tab.value("document.querySelector('.sort select').focus()")
    for expected in (["third", "first", "second"], ["first", "second", "third"], ["first", "second", "third"]):
        tab.press("ArrowDown")  # agreement, highest first; distance, lowest first; PSNR, which the third lacks
        assert tab.value(order) == expected
    assert tab.value("document.querySelector('[role=status]').textContent") == "Sorted: PSNR, highest first"


def test_every_edit_of_a_run_is_there(browser, demo):
    with browser.tab() as tab:
        tab.open(demo.as_uri())
        assert tab.value("document.querySelectorAll('.grid li img').length") == 12
        assert tab.value("document.querySelectorAll('.grid li.chosen').length") == 1
        for number in (1, 12):
            tab.click(f".grid li:nth-child({number}) button")
            place = f"document.querySelector('.grid li:nth-child({number}) img').src"
            assert tab.value(f"document.querySelector('.after img').src === {place}")
        tab.click(".grid li:nth-child(12) summary")
        assert tab.value("document.querySelector('.grid li:nth-child(12) dl:last-child').checkVisibility()")


def test_mask_and_heat_are_seen(tab, tmp_path):
    tab.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as shot:
        for place, colour in ((1, (255, 255, 255)), (2, (0, 0, 0))):
            left, top, width, height = box(tab, f".row figure:nth-child({place}) img")
            assert near(shot.convert("RGB").getpixel((left + width / 2, top + height / 2)), colour)
            assert width > 100


@pytest.mark.parametrize("media", ["", "print"], ids=["screen", "print"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_paper_and_dark_hide_nothing(browser, page, tmp_path, scheme, media):
    with browser.tab() as tab:
        tab.media(media, scheme)
        tab.open(page.as_uri())
        # a closed list is opened by hand, where there are hands
        controls = ".sort, .back, .back *" + ("" if media else ", details, details *")
        hidden = f"{EVERYTHING}.filter((one) => !one.matches('{controls}') && !one.checkVisibility())"
        assert tab.value(f"{hidden}.map((one) => one.outerHTML.slice(0, 80))") == []
        least, place = tab.value(CONTRAST)
        assert least >= 4.5, place
        ground = tab.value("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(21, 22, 23)") is (scheme == "dark" and not media)
        if media:  # both pictures whole, side by side
            assert tab.value("getComputedStyle(document.querySelector('.before img')).clipPath") == "none"
            before, after = box(tab, ".before img"), box(tab, ".after img")
            assert before[0] + before[2] < after[0] and before[1] == after[1]
            tab.pdf(tmp_path / "page.pdf")
            assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF-")


@pytest.mark.parametrize("scripted", [True, False], ids=["scripts", "no scripts"])
@pytest.mark.parametrize("width", [320, 360, 700])
def test_a_narrow_window_is_not_scrolled_sideways(browser, page, width, scripted):
    with browser.tab(scripted) as tab:
        tab.resize(width, 640)
        tab.open(page.as_uri())
        assert tab.call("Page.getLayoutMetrics")["cssContentSize"]["width"] == width


@pytest.mark.parametrize("size", [(1500, 90), (90, 1500), (60, 400)], ids=["wide", "tall", "small and tall"])
def test_a_photo_of_an_odd_shape_is_seen_whole(browser, tmp_path, size):
    """Picture and slider have one place, within the window's height."""
    page = hostile_page(tmp_path)
    sweep = [replace(shown, picture=shown.picture.resize(size)) for shown in page.sweep]
    odd = replace(page, original=Image.new("RGB", size, ORIGINAL), edit=None, sweep=sweep, chosen=None)
    write_page(tmp_path / "page.html", odd)
    with browser.tab() as tab:
        tab.resize(1200, 800)
        tab.open((tmp_path / "page.html").as_uri())
        picture, slider = box(tab, ".before img"), box(tab, ".compare input")
        assert slider == pytest.approx(picture, abs=1) and picture[3] <= 800
