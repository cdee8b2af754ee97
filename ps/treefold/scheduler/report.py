"""A whole run as one file: the live page with its data in it, which opens without any network."""

from treefold.scheduler.pages import INDEX, LICENCE, SCRIPTS, STYLES, file

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)
HEAD, DATA = "<!--HEAD-->", "<!--DATA-->"


def report_of(document: bytes) -> bytes:
    """The page with everything that it needs.

    Parameters
    ----------
    document : bytes
        What a page begins with, as JSON.
    """
    page = file(INDEX).decode()
    for name in STYLES:
        link = f'<link rel="stylesheet" href="{name}">'
        page = _put(page, link, f"<style>\n{file(name).decode()}</style>")
    for name in SCRIPTS:
        link = f'<script src="{name}" defer></script>'
        page = _put(page, link, "")
    licence = file(LICENCE).decode().replace("--", "- -")
    head = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n<!--\n{licence}-->'
    page = _put(page, HEAD, head)
    # In a script element nothing but this can end it: names may have any letters.
    data = document.decode().replace("<", "\\u003c")
    scripts = "\n".join(f"<script>\n{file(name).decode()}</script>" for name in SCRIPTS)
    held = f'<script type="application/json" id="recorded">{data}</script>\n{scripts}'
    return _put(page, DATA, held).encode()


def _put(page: str, where: str, what: str) -> str:
    before, found, after = page.partition(where)
    assert found, f"the page has no {where}"
    return before + what + after
