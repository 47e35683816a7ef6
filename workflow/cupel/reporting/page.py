"""Pages of the site: one template set, no outside resource."""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import quote

import pandas as pd
from jinja2 import Environment, FileSystemLoader, select_autoescape
from markupsafe import Markup, escape

from cupel.files import write_text

TEMPLATES = Path(__file__).parent


def told(form: str, factor: int = 1) -> Callable:
    """A filter that writes a number in this form, an en dash for none."""
    return lambda value: "–" if value is None or pd.isna(value) else form.format(factor * value).replace("-", "−")


def html_table(frame: pd.DataFrame) -> str:
    """A plain HTML table; two header rows where the columns have two levels."""
    return frame.to_html(border=0, classes="data", escape=True, na_rep="–")


def sentence(text: str) -> str:
    """The text with a capital in front."""
    return text[:1].upper() + text[1:]


def coded(text: str) -> Markup:
    """Plain text as HTML, what stands between backticks as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def embedded(content) -> Markup:
    """JSON that may stand in a script element; no value where a number is not finite."""
    return Markup(json.dumps(content, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c"))


def link_to(page: str | Path, path: str | Path) -> str:
    """Address of a file for a page, both relative to one folder."""
    return quote(os.path.relpath(path, Path(page).parent))


def navigation(run: Mapping, up: str = "") -> list[dict]:
    """Address and text of every page of the site.

    Args:
        run: `papers` (with their keys), and whether there are pages `cross` and `compare`.
        up: leads from the page to the folder of the first one.
    """
    pages = [("index.html", "Overview"), ("claims.html", "Claims"), ("cells.html", "Cells")]
    pages += [("cross.html", "Defences side by side")] if run["cross"] else []
    pages += [("compare.html", "Two runs compared")] if run["compare"] else []
    pages += [(f"papers/{paper['key']}/report.html", paper["key"]) for paper in run["papers"]]
    return [{"href": up + href, "text": text} for href, text in pages]


def write_page(path: str | Path, template: str, **content) -> None:
    """Render a template of this folder to `path`."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=select_autoescape(["html", "j2"]),
                              trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(percent=told("{:.1f} %", 100), points=told("{:+.1f}", 100), number=told("{:+.3g}"),
                               plain=told("{:.1f}"), sentence=sentence, coded=coded, table=html_table, embedded=embedded)
    write_text(path, environment.get_template(template).render(**content))
