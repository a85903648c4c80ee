"""HTML that cannot be forged: text is escaped wherever it is put in, unless it was made here."""

from __future__ import annotations

from html import escape

VOID = frozenset(("img", "input", "meta", "rect"))  # elements without an end


class Markup(str):
    """HTML already; any other string is text."""

    __slots__ = ()


def element(tag: str, *children: str, **attributes: str | int | float | bool | None) -> Markup:
    """One element.

    children: Markup goes in as it is, text is escaped
    attributes: True stands alone, None and False are left out; `class_` is class, `aria_label` aria-label
    """
    words = [tag]
    for name, value in attributes.items():
        name = name.rstrip("_").replace("_", "-")
        if value is True:
            words.append(name)
        elif value is not None and value is not False:
            words.append(f'{name}="{escape(str(value))}"')
    start = f"<{' '.join(words)}>"
    if tag in VOID:
        return Markup(start)
    inside = "".join(child if isinstance(child, Markup) else escape(child) for child in children)
    return Markup(f"{start}{inside}</{tag}>")


def join(parts: list[Markup]) -> Markup:
    """Elements one after another, each on its own line."""
    return Markup("\n".join(parts))
