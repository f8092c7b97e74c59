"""The built site, checked: it asks no other host for anything, and its links lead somewhere.

    python tools/check_site.py build/site

It fails if anything is wrong, and says what.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADS = {"script": "src", "img": "src", "source": "src", "iframe": "src", "video": "src", "audio": "src"}
RELATIONS = {"canonical", "next", "prev"}  # of <link>, which load nothing
IN_STYLES = re.compile(r"""(?:url\(\s*['"]?|@import\s+['"])((?:https?:)?//[^'")\s]+)""")


class Page(HTMLParser):
    """What one page loads, links to, and can be linked by.

    Attributes:
        loads: addresses that a browser fetches to show it.
        links: addresses a reader may go to.
        anchors: ids and names.
    """

    def __init__(self, text: str):
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)
        self.loads += IN_STYLES.findall(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called by the parser."""
        found = {name: value or "" for name, value in attrs}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag == "link" and not RELATIONS & set(found.get("rel", "").split()):
            self.loads.append(found.get("href", ""))
        elif LOADS.get(tag, "") in found:
            self.loads.append(found[LOADS[tag]])


def is_foreign(address: str) -> bool:
    """Whether another host is asked."""
    return bool(urlsplit(address).netloc)


def problems(site: Path) -> list[str]:
    """A sentence for each thing that is wrong; empty if nothing is."""
    pages = {path: Page(path.read_text()) for path in sorted(site.rglob("*.html"))}
    if not pages:
        return [f"{site} has no pages; build it: make docs"]
    found = []
    for style in sorted(site.rglob("*.css")):
        found += [f"{style.relative_to(site)} loads {url}" for url in IN_STYLES.findall(style.read_text())]
    for path, page in pages.items():
        name = path.relative_to(site)
        found += [f"{name} loads {url}" for url in page.loads if is_foreign(url)]
        for url in [*page.loads, *page.links]:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc or name.name == "404.html":  # which is served at any depth
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                found.append(f"{name} links to {url}, which is not there")
            elif parts.fragment and target in pages and not _leads(unquote(parts.fragment), pages[target]):
                found.append(f"{name} links to {url}, which has no such place")
    return found


def _leads(fragment: str, page: Page) -> bool:
    return fragment in page.anchors or fragment.startswith("__")  # of the theme's own switches


def main(arguments: list[str]) -> int:
    """Print what is wrong; 1 if anything is."""
    found = problems(Path(arguments[0]).resolve())
    print("\n".join(found) or f"{arguments[0]}: links lead somewhere, nothing is loaded from elsewhere")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
