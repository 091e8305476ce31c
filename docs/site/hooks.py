"""What mkdocs does not know: where a page's links to files outside docs/ lead.

On a code host such a link opens the file. The site has no such file, so the link leads to the
repository, whose address ``CRATE_JAX_REPOSITORY`` names, such as https://HOST/OWNER/NAME. Where it
is not set the link becomes plain text with the file's path.
"""

import os
import posixpath
import re

REPOSITORY = os.environ.get("CRATE_JAX_REPOSITORY", "").rstrip("/")
# Code stays as it is: fenced, indented or within a line.
_FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
_LINK = re.compile(r"(?<!!)\[(?P<text>[^\[\]]+)\]\((?P<target>\.\./[^()\s]+)\)")


def on_page_markdown(markdown, page, config, files):
    """Mend the links of a page."""
    pieces, end = [], 0
    for fence in _FENCE.finditer(markdown):
        pieces += [_mended(markdown[end : fence.start()], page), fence[0]]
        end = fence.end()
    return "".join([*pieces, _mended(markdown[end:], page)])


def _mended(markdown, page):
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def mend(link):
        path, _, anchor = link["target"].partition("#")
        path = posixpath.normpath(posixpath.join(folder, path))
        if path.startswith("docs/"):
            return link[0]
        if REPOSITORY:
            address = f"{REPOSITORY}/blob/main/{path}"
            return f"[{link['text']}]({address}{'#' if anchor else ''}{anchor})"
        name = f"`{path}`"
        return name if link["text"].strip("`") == path else f"{link['text']} ({name})"

    return _LINK.sub(mend, markdown)
