"""Writes what `docs/comparison.md` says of the newest record of the comparison: `make docs` runs it."""

from pathlib import Path

from loadtest.peers.comparison_page import read_newest_record, write_page

PAGE = Path(__file__).with_name("comparison.md")

if __name__ == "__main__":
    text = PAGE.read_text()
    written = write_page(text, read_newest_record())
    if written != text:
        PAGE.write_text(written)
        print(f"written: {PAGE}")
