"""What mkdocs.yml cannot say: pages from elsewhere in the repository, and links to them."""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).resolve().parents[2]
# Pages of the site that are files of the repository outside `docs/`: one text for both.
ELSEWHERE = {
    "index.md": "README.md",
    "trainer.md": "trainer/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#]+)(?=[)#\s])")
# A mark after the language of a block tells tests what to do with it; MkDocs does not know it.
_MARK = re.compile(r"^(\s*```\w+) [\w -]+$", re.MULTILINE)

log = logging.getLogger("mkdocs.hooks")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie elsewhere."""
    for name, path in ELSEWHERE.items():
        text = (REPOSITORY / path).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages."""
    name = page.file.src_uri
    if name == "index.md":
        page.meta["hide"] = ["navigation"]
    path = ELSEWHERE.get(name, f"docs/{name}")
    pages = {path: name for name, path in ELSEWHERE.items()}

    def between_pages(match: re.Match[str]) -> str:
        text, target = match.groups()
        if urlsplit(target).scheme:
            return match[0]
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        found = pages.get(wanted, wanted.removeprefix("docs/"))
        # Where the repository shows the name of a file, the site has the name of a page.
        other = files.get_file_from_path(found)
        is_name = text.endswith(".md") and target.endswith(text)
        if is_name and other is not None and other.page is not None:
            text = str(other.page.title)
        return f"[{text}]({posixpath.relpath(found, posixpath.dirname(name) or '.')}"

    return _LINK.sub(between_pages, _MARK.sub(r"\1", markdown))


def on_page_content(html: str, page: Page, **_: Any) -> None:
    """Complain of external links that cannot be ones; nothing is asked of other servers."""
    for link in re.findall(r'(?:href|src)="([a-z]+:[^"]*)"', html):
        parts = urlsplit(link)
        if parts.scheme != "https" or "." not in parts.netloc or not parts.netloc.isascii():
            log.warning("%s: not a link to elsewhere: %s", page.file.src_uri, link)
