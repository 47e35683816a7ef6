"""The page that a reader opens first: index.html, in one template."""

import html
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, select_autoescape

from cupel.files import write_text

TEMPLATES = Path(__file__).parent


def percent(value) -> str:
    """A fraction in percent with one decimal, an en dash for none."""
    return "–" if value is None or pd.isna(value) else f"{100 * value:.1f} %"


def points(value) -> str:
    """A difference of fractions in points, with its sign."""
    return "–" if value is None or pd.isna(value) else f"{100 * value:+.1f}"


def number(value) -> str:
    """A difference in the unit of its metric, with its sign."""
    return "–" if value is None or pd.isna(value) else f"{value:+.3g}"


def html_table(frame: pd.DataFrame) -> str:
    """A plain HTML table; two header rows where the columns have two levels."""
    return frame.to_html(border=0, classes="data", escape=True, na_rep="–")


def write_page(path: str | Path, template: str, **content) -> None:
    """Render a template of this folder to `path`."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=select_autoescape(["html", "j2"]))
    environment.filters.update(percent=percent, points=points, number=number, table=html_table, quote=html.escape)
    write_text(path, environment.get_template(template).render(**content))
