"""The page that a reader opens first: index.html, in one template."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, select_autoescape

from cupel.files import write_text

TEMPLATES = Path(__file__).parent


def told(form: str, factor: int = 1) -> Callable:
    """A filter that writes a number in this form, an en dash for none."""
    return lambda value: "–" if value is None or pd.isna(value) else form.format(factor * value)


def html_table(frame: pd.DataFrame) -> str:
    """A plain HTML table; two header rows where the columns have two levels."""
    return frame.to_html(border=0, classes="data", escape=True, na_rep="–")


def write_page(path: str | Path, template: str, **content) -> None:
    """Render a template of this folder to `path`."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=select_autoescape(["html", "j2"]))
    environment.filters.update(percent=told("{:.1f} %", 100), points=told("{:+.1f}", 100), number=told("{:+.3g}"),
                               table=html_table)
    write_text(path, environment.get_template(template).render(**content))
