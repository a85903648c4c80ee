"""A page for tests, with hostile words everywhere that words can come from, and a reader of what was written."""

from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

from forgedit.quality.page import Change, Page, Score, Shown

HOSTILE = """</style></script><script>alert("1")</script><img src=x onerror='alert(2)'>"&amp;'"""
ORIGINAL, FIRST, SECOND, THIRD = (250, 10, 20), (10, 240, 30), (20, 30, 230), (240, 230, 10)
SCORES = (
    Score("agreement", f"Agreement {HOSTILE}", "higher", "", f"How well {HOSTILE}"),
    Score("distance", "Distance", "lower", "px"),
    Score("psnr", "PSNR", "neither", "dB"),
)


def plain(colour: tuple[int, int, int], size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.new("RGB", size, colour)


def hostile_page(folder: Path) -> Page:
    """Three edits, the second chosen; the best agreement is the third's, the least distance the first's."""
    path = folder / "original.png"
    plain(ORIGINAL).save(path)
    settings = {"strategy": HOSTILE, "num_steps": 50, "gamma": 1.2, "width": None, HOSTILE: True}
    sweep = [
        Shown(plain(FIRST), f"first {HOSTILE}", settings, {"agreement": 0.5, "distance": 1.0, "psnr": 20.0}, HOSTILE),
        Shown(plain(SECOND), "second", settings, {"agreement": -0.25, "distance": 3.0, "psnr": 10.0}),
        Shown(plain(THIRD), "third", settings, {"agreement": 0.75, "distance": None}),
    ]
    return Page(
        target=f"a striped bird {HOSTILE}",
        caption="a bird",
        original=path,
        edit=sweep[1],
        sweep=sweep,
        chosen=1,
        reason=f"it is good {HOSTILE}",
        scores=SCORES,
        change=Change(Image.new("L", (40, 30), 255), 0.25, Image.new("L", (40, 30)), is_kept=True),
        warnings=[f"look at it {HOSTILE}"],
        seconds={"tune": 30.0, HOSTILE: 10.0},
        facts={f"Model {HOSTILE}": {HOSTILE: HOSTILE}},
        command=f"forgedit edit '{HOSTILE}'",
    )


class Reader(HTMLParser):
    """What an HTML parser sees: tags and attributes in order, text, and the contents of style and script."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.raw: dict[str, str] = {}
        self._inside = ""
        self.source = path.read_text("utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside in ("style", "script"):
            self.raw[self._inside] = self.raw.get(self._inside, "") + data
        else:
            self.text += data

    def pictures(self) -> list[str]:
        return [attributes["src"] for tag, attributes in self.tags if tag == "img"]
