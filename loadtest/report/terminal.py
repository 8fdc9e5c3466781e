"""Renders the tables of a report in the terminal."""

from rich.table import Table as Shown

from loadtest.report.tables import ReportTable


def render_table(table: ReportTable) -> Shown:
    """Render title, headings and rows, with numbers aligned to the right."""
    found = Shown(*table.head, title=table.title, title_justify="left")
    found.columns[0].no_wrap = True
    for column in found.columns[1:]:
        column.justify = "right"
    for row in table.rows:
        found.add_row(*row)
    return found
