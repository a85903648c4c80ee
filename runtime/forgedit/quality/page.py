"""The page of one run: a single HTML file that shows what was made, out of what, how well, and how to make it again.

Everything is inside the file, and its policy (Content-Security-Policy) lets nothing else in: no script, style or font
but the page's own, which are named by their hashes, and no request to anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from importlib.resources import files
from pathlib import Path
from typing import Literal

from forgedit.atomic import write_atomic
from forgedit.quality.embed import Embedded, Picture, embed, embed_many
from forgedit.quality.markup import Markup, element, join

Settings = Mapping[str, object]


@dataclass(frozen=True)
class Score:
    """What a number on the page is.

    name: as the pictures' scores name it; title: as people read it; unit: '' for none
    better: which way is better, or 'neither'; meaning: one sentence, or ''
    """

    name: str
    title: str
    better: Literal["higher", "lower", "neither"] = "higher"
    unit: str = ""
    meaning: str = ""


@dataclass(frozen=True)
class Shown:
    """One edit as the page shows it.

    label: a few words that tell it from the others, such as 'encoderattn, gamma 1'
    settings: of its EditConfig; scores: by Score.name, None where there is none
    rejected: why it was not chosen, '' for nothing to say
    """

    picture: Picture
    label: str
    settings: Settings = field(default_factory=dict)
    scores: Mapping[str, float | None] = field(default_factory=dict)
    rejected: str = ""


@dataclass(frozen=True)
class Change:
    """Where the edit may change the photo.

    share: of the picture that the mask covers; heat: what it was cut from, None for a mask that was given
    is_kept: whether the edit has the photo's own pixels outside the mask
    """

    mask: Picture
    share: float
    heat: Picture | None = None
    is_kept: bool = False


@dataclass(frozen=True)
class Page:
    """All that is shown. Texts are plain: nothing in them is read as HTML. Pictures: see embed.Picture.

    target, caption: the two prompts; original: the photo
    edit: the picture the run delivers, or None where nothing chose one; reason: why that one
    sweep: every edit made, in that order; chosen: which of them `edit` came from, None for none
    scores: the numbers' names, in order; a picture may lack some
    seconds: by stage, in order; facts: titled groups of names and values, such as the model's and the versions'
    command: the shell words that make the edit again, '' if there are none
    Raises: ValueError if there is neither an edit nor a sweep, or no such chosen one
    """

    target: str
    caption: str
    original: Picture
    edit: Shown | None
    sweep: Sequence[Shown] = ()
    chosen: int | None = None
    reason: str = ""
    scores: Sequence[Score] = ()
    change: Change | None = None
    warnings: Sequence[str] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Settings] = field(default_factory=dict)
    command: str = ""

    def __post_init__(self) -> None:
        if self.edit is None and not self.sweep:
            raise ValueError("a page without an edit and without a sweep shows nothing; give one of them")
        if self.chosen is not None and not 0 <= self.chosen < len(self.sweep):
            raise ValueError(f"chosen {self.chosen} is out of range; expected one of the sweep's {len(self.sweep)}")


def write_page(path: Path, page: Page) -> int:
    """Write the page, atomically; its folder must be there.

    Returns: the file's size, bytes
    Raises: OSError naming `path`, or a picture's file that is not there or no PNG
    """
    # a file's name may hold bytes that are no text
    data = _document(page).encode("utf-8", "backslashreplace")
    return write_atomic(path, lambda file: file.write_bytes(data))


def _document(page: Page) -> str:
    style, script = (files("forgedit.quality").joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}"
    sweep = embed_many([shown.picture for shown in page.sweep])
    sections = [_header(page), _compare(page, sweep), _change(page), _grid(page, sweep), _again(page), _times(page)]
    head = [
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=f"{policy}; base-uri 'none'; form-action 'none'"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="referrer", content="no-referrer"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{page.target} · Forgedit"),
        element("style", Markup(style)),
    ]
    body = [element("main", join([part for part in sections if part])), _footer(), element("script", Markup(script))]
    return f'<!doctype html>\n<html lang="en">\n{element("head", join(head))}\n{element("body", join(body))}\n</html>\n'


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}'"


def _header(page: Page) -> Markup:
    """The prompts, with what the target has and the caption lacks marked; and the warnings."""
    parts = [
        element("p", "Forgedit", class_="name"),
        element("h1", *_marked(page.caption, page.target), dir="auto"),
        element("p", element("span", "from", class_="from"), " ", element("q", page.caption, dir="auto")),
    ]
    if page.warnings:
        lines = join([element("li", warning, dir="auto") for warning in page.warnings])
        parts.append(element("aside", element("ul", lines), class_="warnings", aria_label="Warnings"))
    return element("header", join(parts))


def _marked(caption: str, target: str) -> list[str]:
    """The target's words, those that are new in <ins>."""
    old, new = caption.split(), target.split()
    parts: list[str] = []
    for kind, _, _, first, end in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        words = " ".join(new[first:end])
        if words:
            parts += [words if kind == "equal" else element("ins", words), " "]
    return parts[:-1]


def _compare(page: Page, sweep: Sequence[Embedded]) -> Markup:
    """Original and edit: side by side, or one over the other with a slider once the script runs."""
    shown = page.edit or page.sweep[0]
    original = embed(page.original)
    after = embed(shown.picture) if page.edit else sweep[0]
    title = "The edit" if page.edit else "The first edit; none was chosen"
    notes = {picture.note for picture in (original, after)} - {""}
    compare = "compare small" if max(original.full_size) < 512 else "compare"
    figures = [
        _figure(original, "The original photo", "Original", class_="before"),
        _figure(after, f"The edit: {shown.label}", element("span", shown.label, dir="auto"), class_="after"),
        element(
            "input",
            type="range",
            min=0,
            max=100,
            step="any",
            value=50,
            autocomplete="off",
            aria_label="Share of the original that is shown, from the left",
        ),
        element("span", class_="line", aria_hidden="true"),
    ]
    pictures = [
        element("div", join(figures), class_=compare, data_width=original.size[0], data_height=original.size[1]),
        element("p", element("button", "Back to the edit", type="button"), class_="back", hidden=True),
        *(element("p", f"Pictures are {note}.", class_="note") for note in sorted(notes)),
    ]
    panel = [element("h2", title), element("p", shown.label, class_="label", dir="auto")]
    if page.reason:
        panel.append(element("p", page.reason, class_="reason"))
    scores = [score for score in page.scores if score.name in shown.scores]
    if scores:
        panel.append(_scores(scores, shown.scores, with_meanings=True))
    if shown.settings:
        panel += [element("h3", "Settings"), _names_and_values(shown.settings)]
    return element(
        "section",
        element("div", join(pictures), class_="pictures"),
        element("div", join(panel), class_="panel"),
        class_="first",
        aria_label=title,
    )


def _figure(picture: Embedded, alt: str, *caption: str, **attributes: str) -> Markup:
    image = element("img", src=picture.uri, alt=alt, width=picture.size[0], height=picture.size[1])
    return element("figure", image, element("figcaption", *caption), **attributes)


def _change(page: Page) -> Markup:
    if page.change is None:
        return Markup()
    figures = [_figure(embed(page.change.mask), "The mask: white where the edit may change the photo", "Mask")]
    if page.change.heat is not None:
        alt = "Heat picture: white where photo and edit differ most, black where they agree"
        figures.append(_figure(embed(page.change.heat), alt, "The difference it was cut from"))
    rest = "the edit has the photo's own pixels" if page.change.is_kept else "nothing was put back"
    share = f"The mask, white, covers {page.change.share:.1%} of the picture. Outside it, {rest}."
    return _section("Where it changed", element("p", share), element("div", join(figures), class_="row"))


def _grid(page: Page, pictures: Sequence[Embedded]) -> Markup:
    """Every edit; the script sorts them by the scores that data-scores holds in the menu's order."""
    if not page.sweep:
        return Markup()
    scores = [score for score in page.scores if any(score.name in shown.scores for shown in page.sweep)]
    best = {score.name: _best(score, page.sweep) for score in scores}
    tiles = []
    for index, (shown, picture) in enumerate(zip(page.sweep, pictures, strict=True)):
        is_chosen = index == page.chosen
        caption = [element("p", "Chosen", class_="mark")] if is_chosen else []
        caption.append(element("h3", shown.label, dir="auto"))
        present = [score for score in scores if score.name in shown.scores]
        caption.append(_scores(present, shown.scores, best))
        if shown.rejected:
            caption.append(element("p", shown.rejected, class_="rejected", dir="auto"))
        if shown.settings:
            summary = element("summary", "Settings", element("span", f" of {shown.label}", class_="unseen"))
            caption.append(element("details", summary, _names_and_values(shown.settings)))
        values = [value if _finite(value := shown.scores.get(score.name)) else None for score in scores]
        figure = _figure(picture, f"Edit: {shown.label}", *caption)
        tiles.append(element("li", figure, class_="chosen" if is_chosen else None, data_scores=json.dumps(values)))
    words = {"higher": "highest first", "lower": "lowest first", "neither": "highest first"}
    options = [element("option", "as they were made", value="")]
    options += [
        element("option", f"{score.title}, {words[score.better]}", value=index, data_lowest=score.better == "lower")
        for index, score in enumerate(scores)
    ]
    menu = element("label", "Sort: ", element("select", join(options), autocomplete="off"))
    parts = [element("p", menu, class_="sort", hidden=True)] if scores else []
    notes = sorted({picture.note for picture in pictures} - {""})
    parts += [element("p", f"Pictures are {note}; the files are as they were made.", class_="note") for note in notes]
    parts += [element("ol", join(tiles), class_="grid"), element("p", role="status", class_="unseen")]
    return _section(f"All {len(page.sweep)} edits" if len(page.sweep) > 1 else "The one edit made", *parts)


def _best(score: Score, sweep: Sequence[Shown]) -> float | None:
    """The best value of a score; None if there is nothing to be best in."""
    found = [shown.scores.get(score.name) for shown in sweep]
    values = [value for value in found if value is not None and _finite(value)]
    if score.better == "neither" or len(values) < 2:
        return None
    return max(values) if score.better == "higher" else min(values)


def _scores(
    scores: Sequence[Score],
    values: Mapping[str, float | None],
    best: Mapping[str, float | None] | None = None,
    with_meanings: bool = False,
) -> Markup:
    pairs = []
    for score in scores:
        value = values[score.name]
        title: list[str] = [score.title]
        if with_meanings and score.meaning:
            title.append(element("small", score.meaning))
        words: list[str] = [f"{_number(value)} {score.unit}".strip() if _finite(value) else "–"]
        is_best = best is not None and value is not None and value == best[score.name]
        if is_best:
            words.append(element("span", ", the best", class_="unseen"))
        is_best_class = "best" if is_best else None
        pairs.append(element("div", element("dt", *title), element("dd", *words, class_=is_best_class)))
    return element("dl", join(pairs), class_="scores")


def _again(page: Page) -> Markup:
    parts = [element("pre", element("code", *_unbroken(page.command)))] if page.command else []
    groups = [
        element("div", element("h3", title), _names_and_values(values))
        for title, values in page.facts.items()
        if values
    ]
    if groups:
        parts.append(element("div", join(groups), class_="facts"))
    return _section("To make it again", *parts) if parts else Markup()


def _unbroken(command: str) -> list[str]:
    """Its words, each in one piece: a line would otherwise end after a flag's hyphens."""
    words = [element("span", word) for word in command.split(" ")]
    return [part for word in words for part in (word, " ")][:-1]


def _times(page: Page) -> Markup:
    if not page.seconds:
        return Markup()
    longest = max(page.seconds.values())
    rows = [
        element(
            "tr", element("th", stage, scope="row"), element("td", _seconds(spent)), element("td", _bar(spent, longest))
        )
        for stage, spent in page.seconds.items()
    ]
    whole = element("th", "together", scope="row"), element("td", _seconds(sum(page.seconds.values()))), element("td")
    head = element("th", "Stage", scope="col"), element("th", "Seconds", scope="col"), element("td")
    table = [
        element("thead", element("tr", *head)),
        element("tbody", join(rows)),
        element("tfoot", element("tr", *whole)),
    ]
    return _section("Time", element("table", join(table)))


def _bar(spent: float, longest: float) -> Markup:
    """Its length is the share of the longest stage's."""
    length = f"{100 * spent / longest if longest else 0:.1f}"
    bar = element("rect", width=length, height=1)
    return element("svg", bar, viewBox="0 0 100 1", preserveAspectRatio="none", aria_hidden="true")


def _footer() -> Markup:
    return element("footer", element("p", "Made by Forgedit. All of this page is in this one file; it loads nothing."))


def _section(title: str, *parts: str) -> Markup:
    return element("section", element("h2", title), *parts)


def _names_and_values(values: Settings) -> Markup:
    pairs = [
        element("div", element("dt", name.replace("_", " ")), element("dd", _words(value), dir="auto"))
        for name, value in values.items()
    ]
    return element("dl", join(pairs))


def _words(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _number(value: float | None) -> str:
    """Three figures, without an exponent where people would write none."""
    assert value is not None
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 3
    return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _seconds(spent: float) -> str:
    return f"{spent:.0f}" if spent >= 100 else f"{spent:.1f}" if spent >= 10 else f"{spent:.2f}"
