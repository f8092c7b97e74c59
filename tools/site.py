"""What the site has that docs/ has not, as hooks of MkDocs (mkdocs.yml).

- README, changelog and contributing become pages; links between files of the repository become links between
  pages, or stay as text where the site has no such page.
- Linked source files become pages of their own.
- In a page, `<!-- code: methods/alternating.py Alternating.step -->` after a block of formulas puts the code
  of that name beside it, as it stands in the source.
- Notebooks become pages, and .ipynb files to download; with outputs, if `make notebooks` has run them.
"""

from __future__ import annotations

import ast
import base64
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

import notebooks as scripts

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
CODE = re.compile(r"<!-- code: (\S+) (\S+) -->\n")
BESIDE = re.compile(rf"((?:^ {{4}}.*\n|^\n)+)((?:{CODE.pattern})+)", re.M)
SOURCES = ("src/momatch", "examples")  # of which files become pages
FENCE = "~~~~"  # no source has one


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    for path, uri in PAGES.items():
        files.append(File.generated(config, uri, content=(ROOT / path).read_text()))
    for name in scripts.names():
        files.append(File.generated(config, f"notebooks/{name}.md", content=notebook_page(name)))
        files.append(File.generated(config, f"notebooks/{name}.ipynb", content=ipynb(name)))
        for number, image in enumerate(images(outputs(name))):
            uri = f"notebooks/{name}-{number}.png"
            files.append(File.generated(config, uri, content=image))
    texts = [file.content_string for file in files.documentation_pages()]
    linked = {match[3].removeprefix("../") for text in texts for match in LINK.finditer(text)}
    linked |= {f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py")}
    for path in sorted(linked):
        if path.endswith(".py") and path.startswith(SOURCES) and "notebooks" not in path:
            inclusion = InclusionLevel.NOT_IN_NAV
            uri, text = source_uri(path), source_page(path)
            files.append(File.generated(config, uri, content=text, inclusion=inclusion))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links, and code beside formulas."""
    uri = page.file.src_uri
    if uri == "the-method.md":
        page.meta["hide"] = ["toc"]  # the room is for the code
    if not uri.startswith(("source/", "notebooks/")):
        markdown = BESIDE.sub(beside, markdown)
        markdown = re.sub(
            r"^\|.*$",
            lambda row: row[0].replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}"),
            markdown,
            flags=re.M,
        )
    here = next((path for path, of in PAGES.items() if of == uri), f"docs/{uri}")
    return LINK.sub(lambda match: link(match, here, uri, files), markdown)


def title(file: File) -> str:
    """The first heading of a page."""
    found = re.search(r"^# (.+)$", file.content_string, re.M)
    return found[1] if found else file.name


def link(match: re.Match[str], here: str, uri: str, files: Files) -> str:
    """A link of the file `here` in the repository, for the page `uri`; its words alone if it has no page."""
    mark, words, target, anchor = match[1], match[2], match[3], match[4] or ""
    if re.match(r"[a-z]+:", target):
        return match[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
    found = PAGES.get(path) or (source_uri(path) if path.endswith(".py") else path.removeprefix("docs/"))
    if path.startswith("examples/notebooks/"):
        found = f"notebooks/{posixpath.basename(path).replace('.py', '.md')}"
    if path in ("examples/notebooks", "examples/notebooks/README.md"):
        found = "notebooks/index.md"
    page = files.get_file_from_path(found)
    if page is not None and words.endswith(".md"):  # readers of the site know no files
        words = title(page)
    if page is None:
        if not (ROOT / path).exists():
            return match[0]  # which the build then refuses
        return words
    return f"{mark}[{words}]({posixpath.relpath(found, posixpath.dirname(uri) or '.')}{anchor})"


def beside(match: re.Match[str]) -> str:
    """Formulas and, beside them, the code that does them."""
    formulas = "\n".join(line[4:] for line in match[1].strip("\n").splitlines())
    parts = []
    for file, name in CODE.findall(match[2]):
        code, first = definition(file, name)
        parts.append(f'{FENCE}{{ .python title="{file}, {name}, line {first}" }}\n{code}\n{FENCE}\n')
    codes = "\n".join(parts)
    return (
        f'\n<div class="beside" markdown>\n\n{FENCE}text\n{formulas}\n{FENCE}\n\n'
        f"<div markdown>\n\n{codes}\n</div>\n\n</div>\n\n"
    )


def definition(file: str, name: str) -> tuple[str, int]:
    """Source of a function or method below src/momatch without its docstring, and its first line's number.

    Raises:
        LookupError: if there is none.
    """
    text = (ROOT / "src" / "momatch" / file).read_text()
    node: Any = ast.parse(text)
    for part in name.split("."):
        named = [each for each in node.body if getattr(each, "name", "") == part]
        if not named:
            raise LookupError(f"{file} has no {name}")
        node = named[0]
    lines = text.splitlines()
    body = node.body
    if len(body) > 1 and ast.get_docstring(node) is not None:
        doc = body[0]
        kept = lines[node.lineno - 1 : doc.lineno - 1] + lines[doc.end_lineno : node.end_lineno]
    else:
        kept = lines[node.lineno - 1 : node.end_lineno]
    indent = node.col_offset
    return "\n".join(line[indent:] for line in kept), node.lineno


def source_uri(path: str) -> str:
    """The page of a source file."""
    return f"source/{path.removeprefix('src/').removesuffix('.py')}.md"


def source_page(path: str) -> str:
    """A source file as a page."""
    text = (ROOT / path).read_text().rstrip("\n")
    return f"# {Path(path).name}\n\n`{path}`\n\n{FENCE}{{ .python linenums=1 }}\n{text}\n{FENCE}\n"


def executed(name: str) -> Any:
    """The notebook as `make notebooks` left it; None if its cells have changed since, or it has not run."""
    import nbformat

    path = scripts.OUT / f"{name}.ipynb"
    if not path.is_file():
        return None
    found = nbformat.read(path, as_version=4)
    same = [cell.source for cell in found.cells] == [cell.source for cell in scripts.read(name).cells]
    return found if same else None


def ipynb(name: str) -> str:
    """The file to download: without outputs, as one opens it to run it."""
    import nbformat

    return nbformat.writes(scripts.read(name))


def outputs(name: str) -> list[list[Any]]:
    """Of each cell."""
    found = executed(name)
    return [] if found is None else [cell.get("outputs", []) for cell in found.cells]


def images(cells: list[list[Any]]) -> list[bytes]:
    """All images among outputs, in order."""
    data = [output.get("data", {}) for cell in cells for output in cell]
    return [base64.b64decode(each["image/png"]) for each in data if "image/png" in each]


def notebook_page(name: str) -> str:
    """A notebook as Markdown: its text, its code, what the code showed."""
    notebook, shown = scripts.read(name), outputs(name)
    parts, number = [], 0
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            if i == 0:
                parts.append(f"[Download this notebook]({name}.ipynb){{ .md-button download }}")
            continue
        parts.append(f"{FENCE}python\n{cell.source}\n{FENCE}")
        for output in shown[i] if shown else []:
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"![what the cell shows]({name}-{number}.png)")
                number += 1
            elif output.get("name") != "stderr" and (text := output.get("text") or data.get("text/plain")):
                parts.append(f"{FENCE}{{ .text .output }}\n{text.rstrip()}\n{FENCE}")
    return "\n\n".join(parts) + "\n"
