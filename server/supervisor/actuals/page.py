"""The page of reports: one HTML document with a drawing for each market, and nothing from elsewhere. Pure.

INVARIANT: names come from stores and clients, and are escaped wherever they are written.
"""

from collections.abc import Sequence
from html import escape
from urllib.parse import urlencode

from server.contract import ACCURACY_PAGE_PATH, ACTUALS_PATH
from server.supervisor.actuals.report import ALARM_DAYS, SHOWN_DAYS, BandReport, MarketReport

WIDTH, HEIGHT = 200, 36  #: of a drawing, in pixels
FAR = 0.05  #: a band that holds so much less or more than it promises is marked
DRAWN_BAND = 0.8  #: the band whose coverage by day is drawn, or the one nearest to it
MARK = ' class="off"'
_HEAD = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Forecasts and prices</title>
<link rel="stylesheet" href="{ACCURACY_PAGE_PATH}/accuracy.css">
</head>
<body>
<h1>Forecasts and prices</h1>
"""
_WORDS = (
    f"<p>The last {SHOWN_DAYS} days with prices of each archive, or of each of its products as "
    "<code>NAME#PRODUCT</code>. A band of 80 % should hold 80 % of them; one that is "
    f"more than {100 * FAR:.0f} percentage points off is marked. Pinball: the mean quantile loss, in the unit of the "
    "prices; to naive: that loss divided by the naive forecast's, below 1 is better. The drawing is the "
    "share inside the band by day, the dashed line what it promises. Offset: the largest of its levels, in widths of "
    "the band of 80 %; marked at the bound. Drift: the losses of days grew; where days are alike, an archive has a "
    f"false alarm once in ten years. An alarm is shown for {ALARM_DAYS} days.</p>"
)
_OFF = "<p>This server keeps no prices: <code>--actuals FOLDER</code> lets it.</p>"
_EMPTY = f"<p>No forecast has been kept yet. Clients send prices to <code>POST {ACTUALS_PATH}</code>.</p>"


def render_page(reports: Sequence[MarketReport], *, is_on: bool, prefix: str = "", following: str | None = None) -> str:
    """Render the page. `following`: the name after which the next page begins; None: there is none."""
    if not reports:
        return f"{_HEAD}{_EMPTY if is_on else _OFF}</body></html>\n"
    promised = sorted({band.promised for report in reports for band in report.bands})
    heads = [
        "model",
        "prices",
        *(f"in {each:.0%}" for each in promised),
        "by day",
        "pinball",
        "to naive",
        "offset",
        "drift",
    ]
    rows = "\n".join(_render_row(report, promised) for report in reports)
    named = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    table = f"<table>\n<tr>{named}</tr>\n{rows}\n</table>"
    wide = f'<div class="wide" tabindex="0" role="region" aria-label="Archives">{table}</div>'
    more = ""
    if following is not None:
        query = urlencode({"prefix": prefix, "after": following})
        more = f'<p><a href="{ACCURACY_PAGE_PATH}?{escape(query)}">more</a></p>'
    return f"{_HEAD}{_WORDS}{wide}{more}</body></html>\n"


def _render_row(report: MarketReport, promised: Sequence[float]) -> str:
    bands = {band.promised: band for band in report.bands}
    drift = f"since {escape(report.drift_since or '')}" if report.drifts else "-"
    cells = [
        f"<td>{escape(report.model)}</td>",
        f"<td>{report.prices}</td>",
        *(_render_coverage(bands.get(each)) for each in promised),
        f"<td>{_draw_days(report)}</td>",
        f"<td>{_format(report.pinball)}</td>",
        f"<td>{_format(report.pinball_to_naive)}</td>",
        f"<td{MARK if report.largest_offset >= report.bound else ''}>{report.largest_offset:.2f}</td>",
        f'<td class="drift">{drift}</td>' if report.drifts else f"<td>{drift}</td>",
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _render_coverage(band: BandReport | None) -> str:
    if band is None:
        return "<td>-</td>"
    return f"<td{MARK if abs(band.covered - band.promised) > FAR else ''}>{band.covered:.1%}</td>"


def _draw_days(report: MarketReport) -> str:
    """Draw the share inside the band by day, from 0 at the bottom to 1 at the top."""
    if not report.days or not report.bands:
        return ""
    i = min(range(len(report.bands)), key=lambda at: abs(report.bands[at].promised - DRAWN_BAND))
    step = WIDTH / max(1, len(report.days) - 1)
    points = " ".join(f"{at * step:.1f},{_place(day.covered[i]):.1f}" for at, day in enumerate(report.days))
    level, promised = _place(report.bands[i].promised), report.bands[i].promised
    title = f"{report.model}: share inside the band of {promised:.0%} by day"
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
        f"<title>{escape(title)}</title>"
        f'<rect class="frame" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}"/>'
        f'<line class="promised" x1="0" x2="{WIDTH}" y1="{level:.1f}" y2="{level:.1f}"/>'
        f'<polyline class="held" points="{points}"/></svg>'
    )


def _place(share: float) -> float:
    return 2 + (HEIGHT - 4) * (1 - share)


def _format(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
