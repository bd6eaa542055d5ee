"""Links of the documents lead somewhere, as far as that can be told offline."""

from urllib.parse import urlsplit

import pytest

from tests import pages


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name)
def test_links(page):
    for link in pages.links(page):
        url = urlsplit(link)
        if url.scheme:
            assert url.scheme in ("http", "https"), link
            assert "." in url.netloc, link
            continue
        target = (page.parent / url.path).resolve() if url.path else page
        assert target.exists(), link
        if url.fragment:
            assert url.fragment in pages.anchors(target), link


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name)
def test_headings_are_anchors_once(page):
    anchors = pages.anchors(page)
    assert page.name == "CHANGELOG.md" or len(set(anchors)) == len(anchors)


def test_every_page_is_reached_from_the_readme():
    reached, new = set(), {pages.README}
    while new:
        reached |= new
        found = {
            (page.parent / urlsplit(link).path).resolve()
            for page in new
            for link in pages.links(page)
            if not urlsplit(link).scheme
        }
        new = {page for page in found if page.suffix == ".md"} - reached
    site = {"index.md", "api.md", "changelog.md", "contributing.md", "report.md", "tuning.md"}
    assert {page for page in pages.PAGES if page.name not in site} <= reached
