"""HTML reports from the jinja2 templates beside the modules: each a single file that opens offline."""

import base64
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import jinja2
import matplotlib

from sevloss import write_atomically, write_text

matplotlib.rcParams["text.parse_math"] = False  # a $ in a run's name is no formula
# With autoescape, a text from a table or a model is never markup.
_templates = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)


class Table(NamedTuple):
    header: list
    rows: list  # a text, then numbers


def picture(figure, title, path):
    """Saves a matplotlib figure as `path` -> what page.html embeds: title, source (a data: URL), width in CSS
    pixels."""
    buffer = BytesIO()
    figure.savefig(buffer, dpi=130)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getvalue()))
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return {"title": title, "source": f"data:image/png;base64,{encoded}",
            "width": round(100 * figure.get_figwidth())}


def write_page(path, template, **content):
    """template: its path from this folder; content: its variables."""
    text = _templates.get_template(template).render(content).strip() + "\n"
    write_text(path, text)
