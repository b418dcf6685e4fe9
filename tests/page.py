"""Reads a report's page as a browser would: its tags, visible texts, tables and Arabic blocks, by section."""

import base64
import html.parser
from collections import defaultdict

EMPTY = ("meta", "img", "br")  # have no end


class Page(html.parser.HTMLParser):
    """Fails where tags are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open = []  # (tag, attributes)
        self.tags = []  # (tag, attributes)
        self.texts = []  # with the white space that a browser shows
        self.arabic = []  # (text, whether it runs from right to left)
        self.sections = []  # titles, in order
        self.tables = defaultdict(list)  # section -> tables, lists of rows of cells
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag not in EMPTY:
            self.open.append((tag, attributes))
        if tag == "table":
            self.tables[self.sections[-1]].append([])
        elif tag == "tr":
            self.tables[self.sections[-1]][-1].append([])
        elif tag in ("td", "th"):
            self.tables[self.sections[-1]][-1][-1].append("")
        elif tag == "h2":
            self.sections.append("")

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.texts.append(" ".join(data.split()))
        tag = self.open[-1][0] if self.open else ""
        if tag in ("td", "th"):
            self.tables[self.sections[-1]][-1][-1][-1] += data
        elif tag == "h2":
            self.sections[-1] += data
        if any(attributes.get("lang") == "ar" for _, attributes in self.open):
            self.arabic.append((data, any(attributes.get("dir") == "rtl" for _, attributes in self.open)))


def assert_needs_nothing(text, pictures):
    """The page opens offline: it has no script and no address of anything; `pictures`, files, are inside."""
    tags = Page(text).tags
    assert not {tag for tag, _ in tags} & {"script", "link", "iframe", "object", "embed", "form", "base"}
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text
    assert all(a["href"].startswith("#") for _, a in tags if "href" in a)
    sources = [a["src"] for _, a in tags if "src" in a]
    encoded = [base64.b64encode(path.read_bytes()).decode() for path in pictures]
    assert sources == [f"data:image/png;base64,{picture}" for picture in encoded]
    policy, = (a["content"] for _, a in tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def assert_links_lead_to_sections(text):
    page = Page(text)
    targets = [a["href"].removeprefix("#") for tag, a in page.tags if tag == "a"]
    assert targets == [a["id"] for tag, a in page.tags if tag == "h2"] and len(targets) > 2
