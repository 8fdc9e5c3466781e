"""Writes the generated pages of the reference: `make docs` runs it. It prints the pages that have changed."""

import sys
from pathlib import Path

from loadtest.cli import app as load_app
from server.cli.main import app
from server.cli.reference.pages import render_pages

PROGRAMS = {"fleetcast": app, "fleetcast-load": load_app}


def main(folder: Path) -> None:
    """Write each page into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in render_pages(PROGRAMS).items():
        page = folder / name
        if not page.exists() or page.read_text() != text:
            page.write_text(text)
            print(f"written: {page}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "reference")
