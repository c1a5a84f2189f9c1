"""A run told as one HTML page that needs nothing else: no other file, no request, no script.

A page is a head (title, verdict, a few large figures) and chapters, a chapter a head and sections. A section is a
function of what was found that returns a `Section`; each task brings its own findings and its own list of such
functions, as `classifier_page` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from .charts import join

TEMPLATE = Path(__file__).with_name("report.html")


@dataclass(frozen=True)
class Tile:
    """A large figure of the head: what it is, its value, its unit."""

    name: str
    value: str
    unit: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page: anchor for links, title, one or two sentences, content."""

    anchor: str
    title: str
    lead: str
    body: Markup


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """What a page tells of one task; `met` says whether what it set out for was reached, None where it had no goal."""

    anchor: str
    name: str
    title: str
    lead: str
    sections: Sequence[Section]
    met: bool | None = None
    verdict: str = ""
    tiles: Sequence[Tile] = ()


@dataclass(frozen=True, kw_only=True)
class Page:
    """A whole page; `met` says whether everything that was set out for was reached."""

    title: str
    eyebrow: str
    lead: str
    met: bool
    verdict: str
    tiles: Sequence[Tile]
    chapters: Sequence[Chapter]
    footer: str


def render(page: Page) -> str:
    """The page as HTML."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(**vars(page))


def card(body: Markup) -> Markup:
    """A raised surface around something."""
    return Markup('<div class="card">{}</div>').format(body)


def columns(parts: Sequence[Markup]) -> Markup:
    """Things side by side where there is room."""
    return Markup('<div class="columns">{}</div>').format(join(parts))


def roomy(chart: Markup) -> Markup:
    """A bar chart with room for long names."""
    return Markup('<div class="bars roomy">{}</div>').format(chart)


def table(title: str, rows: Sequence[tuple[str, str]]) -> Markup:
    """Names and values."""
    lines = [Markup("<tr><th scope='row'>{}</th><td>{}</td></tr>").format(name, value) for name, value in rows]
    return Markup("<figure><figcaption>{}</figcaption><table>{}</table></figure>").format(title, join(lines))


def grid(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    """A table whose first column names the rows; the others are figures."""
    head = join([Markup("<th scope='col'>{}</th>").format(name) for name in header])
    lines = []
    for name, *values in rows:
        cells = join([Markup("<td>{}</td>").format(value) for value in values])
        lines.append(Markup("<tr><th scope='row'>{}</th>{}</tr>").format(name, cells))
    return Markup(
        "<figure><figcaption>{}</figcaption><div class='scroll'><table class='figures'><thead><tr>{}</tr></thead>"
        "<tbody>{}</tbody></table></div></figure>"
    ).format(title, head, join(lines))


def seconds(value: float) -> str:
    """Seconds in words that suit their length."""
    if value < 9.95:
        return f"{value:.1f} seconds"
    minutes, rest = divmod(round(value), 60)
    return f"{round(value)} seconds" if value < 99.5 else f"{minutes}:{rest:02} minutes"
