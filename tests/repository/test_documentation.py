"""The site that `make docs` builds: whatever leads nowhere fails it, and it needs no network."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import markdown_it
import pytest
from markdown_it import token

ROOT: Final = Path(__file__).parents[2]
SITE: Final = ROOT / "build" / "docs"
PAGES: Final = (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))

SOURCE: Final = r"(?<![\w/.])(?:tests|core|daemon|client|proto)/[\w/]+\.(?:py|proto)\b"

MISTAKES: Final = {
    "docs/policy.md": "[a page](nowhere.md)",
    "docs/client.md": "[an anchor](api.md#nowhere)",
    "docs/api.md": "[an anchor of its own](#nowhere)",
    "docs/reliability.md": "[a test](../tests/nowhere.py)",
    "docs/operations.md": "![a picture](nowhere.svg)",
    "README.md": "[a page](docs/nowhere.md)",
    "CHANGELOG.md": "[an anchor](docs/policy.md#nowhere)",
    "docs/unlisted.md": "# A page that the index does not list",
}
"""What is added to a page, and has to be told of it."""


def build(source: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Build the site, as `make docs` does."""
    sphinx = Path(sys.executable).with_name("sphinx-build")
    return subprocess.run(
        [
            sphinx,
            *(
                "--fail-on-warning",
                "--keep-going",
                "--quiet",
                "--no-color",
                "-c",
                "docs",
                ".",
                site,
            ),
        ],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the repository, to be changed."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist")
    return Path(shutil.copytree(ROOT, tmp_path / "copy", ignore=ignored))


def test_broken_link_fails_the_documentation_build(copy: Path, tmp_path: Path) -> None:
    """With the page that has it."""
    for page, mistake in MISTAKES.items():
        with (copy / page).open("a", encoding="utf-8") as file:
            file.write(f"\n{mistake}\n")
    built = build(copy, tmp_path / "site")
    assert built.returncode != 0
    reported = re.findall(
        rf"^{re.escape(str(copy))}/(.*\.md)(?::\d+)?: WARNING", built.stderr, re.MULTILINE
    )
    assert sorted(reported) == sorted(MISTAKES), built.stderr


def test_documentation_site_needs_no_network() -> None:
    """No page loads a script, a font or a picture from elsewhere."""
    assert SITE.is_dir(), "make docs"
    pages = list(SITE.rglob("*.html"))
    assert {"index.html", "policy.html"} <= {page.name for page in pages}
    for page in pages:
        loaded = re.findall(
            r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"((?:https?:)?//[^\"]*)",
            page.read_text(),
        )
        assert loaded == [], page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_linked_test_in_the_documentation_exists(page: Path) -> None:
    """The build sees that the file is there; this, that the test is in it."""
    for name, path in linked_tests(page.read_text(encoding="utf-8")):
        text = (page.parent / path).read_text(encoding="utf-8")
        assert re.search(rf"^ *(?:async )?def {name}\(", text, re.MULTILINE), f"{path}::{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_source_file_named_in_the_documentation_exists(page: Path) -> None:
    """As in docs/architecture.md, and in the commands of docs/reliability.md."""
    code = (part.content for part in inline(page.read_text("utf-8")) if part.type == "code_inline")
    for path in re.findall(SOURCE, "\n".join(code), re.MULTILINE):
        assert (ROOT / path).exists(), path


def test_documentation_links_to_many_tests() -> None:
    """Or the test above would no longer find them."""
    linked = [link for page in PAGES for link in linked_tests(page.read_text("utf-8"))]
    assert len(linked) > 60


def linked_tests(text: str) -> list[tuple[str, str]]:
    """The name of each test that is a link, and the file that it leads to."""
    return [
        (name.content, str(link.attrs["href"]))
        for link, name in itertools.pairwise(inline(text))
        if link.type == "link_open" and re.fullmatch(r"test_\w+", name.content)
    ]


def inline(text: str) -> list[token.Token]:
    """A page's links, code and words, in tables too."""
    markdown = markdown_it.MarkdownIt("gfm-like", {"linkify": False})
    return [part for block in markdown.parse(text) for part in block.children or ()]
