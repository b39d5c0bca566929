"""How Sphinx builds the site from the Markdown files of the repository (`make docs`).

The source directory is the repository itself: so each link is the same on the site and between the
files, and the build checks it. A link to a file that is no page (a test, the contract) becomes a
download, and the build checks that the file exists.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from sphinx.application import Sphinx

project = "convertd"
extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**.md"]
exclude_patterns = [".*", "build", "dist", "client", "daemon", "tests"]  # not searched: many files
nitpicky = True  # a link that leads nowhere is a warning, and `make docs` fails on warnings

highlight_language = "none"  # most blocks are shell sessions or diagrams
smartquotes = False  # would make a dash of the -- of an option
myst_heading_anchors = 4  # as GitHub names them
myst_enable_extensions = ["deflist"]  # as in the manual pages

html_theme = "pydata_sphinx_theme"
html_title = "convertd"
html_copy_source = False
html_use_index = False
templates_path = ["_templates"]
html_sidebars = {"**": ["all_pages.html"]}
html_theme_options = {
    "navbar_center": [],
    "navbar_end": ["theme-switcher"],
    "footer_start": [],
    "footer_end": [],
}

NAVIGATED = {"docs/index", "docs/decisions/index"}
"""The pages whose lists of links are the site's navigation too."""

LINK = re.compile(r"^- \[(.+?)\]\((.+?)\.md\)", re.MULTILINE)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", complete)


def complete(_: Sphinx, page: str, source: list[str]) -> None:
    """Add to a page what the site needs and the file in the repository does not."""
    if page in NAVIGATED:
        source[0] = "\n## ".join(with_navigation(part) for part in source[0].split("\n## "))
    if page == "docs/man/convertctl.1":
        command = (sys.executable, Path(__file__).parents[1] / "packaging/convertctl-commands")
        source[0] = subprocess.check_output(command, input=source[0], text=True)
    if page.startswith("docs/man/"):
        name, section = page.removeprefix("docs/man/").split(".")
        source[0] = f"# {name}({section})\n\n" + re.sub("^# ", "## ", source[0], flags=re.MULTILINE)


def with_navigation(section: str) -> str:
    """Add a section's links to the navigation, below the section's heading."""
    entries = "\n".join(f"{title} <{path}>" for title, path in LINK.findall(section))
    if not entries:
        return section
    caption = section.partition("\n")[0].lstrip("# ")
    return f"{section}\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n```\n"
