"""Charts as SVG in HTML: no script, colours for light and dark, numbers on hovering."""

import html
import math
from collections.abc import Callable, Iterator

from dashboards.figures import COLOURS
from dashboards.tokens import plain_visible, shortened
from saescope.pieces import Chart, Series, nice_ticks

WIDTH, HEIGHT = 480, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 46
_NAMED = 14
"""points up to which each has its name beside it"""
_LONGEST_NAME = 26
STYLE = """
figure{margin:0;min-width:0}figcaption{font-weight:600;margin-bottom:.15rem}
.chart{width:100%;height:auto;display:block;overflow:visible}
.chart text{fill:currentColor;font-size:12px;opacity:.8;font-variant-numeric:tabular-nums}
.chart .grid{stroke:currentColor;opacity:.13}.chart .axis{stroke:currentColor;opacity:.4}
.legend{display:flex;flex-wrap:wrap;gap:.15rem .9rem;list-style:none;padding:0;margin:.2rem 0 0;
font-size:.82rem}
.legend i{display:inline-block;width:.7rem;height:.7rem;border-radius:2px;margin-right:.35rem}
"""
Scale = Callable[[float], float]


def figure_html(chart: Chart) -> str:
    """A chart with its title, a legend where it has several series, and what it is."""
    about = f'<p class="quiet">{_escaped(chart.about)}</p>' if chart.about else ""
    return (
        f"<figure><figcaption>{_escaped(chart.title)}</figcaption>{about}{svg(chart)}"
        f"{_legend(chart)}</figure>"
    )


def svg(chart: Chart) -> str:
    """The drawing alone."""
    across, up = _scales(chart)
    drawn = "".join(
        piece
        for number, series in enumerate(chart.series)
        for piece in _KINDS[chart.kind](chart, series, number, across, up)
    )
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{_escaped(chart.title)}">{"".join(_axes(chart, across, up))}{drawn}</svg>'
    )


def alone(chart: Chart, style: str) -> str:
    """The drawing and its legend as an SVG file, which no page gives a style to."""
    legend = "".join(
        f'<circle cx="{_LEFT + 6}" cy="{HEIGHT + 14 + 18 * number}" r="5" '
        f'fill="{_colour(number)}"/><text x="{_LEFT + 18}" y="{HEIGHT + 18 + 18 * number}">'
        f"{_escaped(series.name)}</text>"
        for number, series in enumerate(chart.series)
    )
    tall = HEIGHT + (18 * len(chart.series) + 10 if len(chart.series) > 1 else 0)
    head, body = svg(chart).split(">", 1)
    head = head.replace(f"{WIDTH} {HEIGHT}", f"{WIDTH} {tall}", 1)
    head = head.replace("<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" ', 1)
    legend = legend if len(chart.series) > 1 else ""
    return f"{head}><style>{style}{STYLE}</style>{body.removesuffix('</svg>')}{legend}</svg>\n"


def _scales(chart: Chart) -> tuple[Scale, Scale]:
    left, right, low, high = chart.bounds()
    if chart.ticks:
        left, right = -0.5, len(chart.ticks) - 0.5
    elif chart.kind == "points":
        left = min(left, 0.0)
        right += 0.06 * ((right - left) or 1.0)
    if chart.log_x:
        left, right = math.log10(left), math.log10(right)
    wide, tall = (right - left) or 1.0, (high - low) or 1.0

    def across(x: float) -> float:
        part = ((math.log10(x) if chart.log_x else x) - left) / wide
        return _LEFT + part * (WIDTH - _LEFT - _RIGHT)

    def up(y: float) -> float:
        return HEIGHT - _BOTTOM - (y - low) / tall * (HEIGHT - _TOP - _BOTTOM)

    return across, up


def _axes(chart: Chart, across: Scale, up: Scale) -> Iterator[str]:
    left, right, low, high = chart.bounds()
    ground, end = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    for value in nice_ticks(low, high):
        y = up(value)
        yield f'<line class="grid" x1="{_LEFT}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(value)}</text>'
    yield f'<line class="axis" x1="{_LEFT}" x2="{end}" y1="{ground}" y2="{ground}"/>'
    for x, text in _x_ticks(chart, left, right):
        yield (
            f'<text x="{across(x):.1f}" y="{ground + 16}" text-anchor="middle">'
            f"{_escaped(text)}</text>"
        )
    middle = (_LEFT + end) / 2
    yield f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{_escaped(chart.x)}</text>'
    yield (
        f'<text transform="translate(13 {(_TOP + ground) / 2}) rotate(-90)" text-anchor="middle">'
        f"{_escaped(chart.y)}</text>"
    )


def _x_ticks(chart: Chart, left: float, right: float) -> list[tuple[float, str]]:
    if chart.ticks:
        every = math.ceil(len(chart.ticks) * max(map(len, chart.ticks)) / 52)
        return [(n, text) for n, text in enumerate(chart.ticks) if n % every == 0]
    if not chart.log_x:
        if chart.kind == "points":
            left = min(left, 0.0)
        return [(value, _number(value)) for value in nice_ticks(left, right, 6)]
    decades = range(math.floor(math.log10(left)), math.ceil(math.log10(right)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [f * 10.0**n for n in decades for f in factors]
        found = [each for each in found if left * 0.999 <= each <= right * 1.001]
        if len(found) > 2 or factors[-1] == 5:
            break
    every = math.ceil(len(found) / 7)
    return [(value, _number(value)) for value in found[::-1][::every]]


def _line(chart: Chart, series: Series, number: int, across: Scale, up: Scale) -> Iterator[str]:
    colour = _colour(number)
    points = [(across(x), y) for x, y in zip(series.x, series.y, strict=True)]
    known = [f"{x:.1f},{up(y):.1f}" for x, y in points if y is not None]
    yield (f'<polyline points="{" ".join(known)}" fill="none" stroke="{colour}" stroke-width="2"/>')
    yield from _dots(chart, series, number, across, up)


def _dots(chart: Chart, series: Series, number: int, across: Scale, up: Scale) -> Iterator[str]:
    colour = _colour(number)
    halves = series.half or (None,) * len(series.y)
    for index, (x, y, half) in enumerate(zip(series.x, series.y, halves, strict=True)):
        if y is None:
            continue
        at, height = across(x), up(y)
        if half is not None:
            yield (
                f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{up(y - half):.1f}" '
                f'y2="{up(y + half):.1f}" '
                f'stroke="{colour}" stroke-opacity=".55" stroke-width="1.5"/>'
            )
        name = series.labels[index] if series.labels else series.name
        said = f"{name}: {chart.y} {y:{chart.form}}" + (f" ± {half:{chart.form}}" if half else "")
        yield (
            f'<circle cx="{at:.1f}" cy="{height:.1f}" r="3.5" fill="{colour}">'
            f"<title>{_escaped(said)}</title></circle>"
        )


def _points(chart: Chart, series: Series, number: int, across: Scale, up: Scale) -> Iterator[str]:
    yield from _dots(chart, series, number, across, up)
    if sum(len(each.x) for each in chart.series) > _NAMED:
        return
    for x, y, label in zip(series.x, series.y, series.labels, strict=True):
        if y is None:
            continue
        at = across(x)
        left = at > WIDTH * 0.6
        yield (
            f'<text x="{at - 7 if left else at + 7:.1f}" y="{up(y) - 5:.1f}" '
            f'text-anchor="{"end" if left else "start"}">'
            f"{_escaped(shortened(label, _LONGEST_NAME))}</text>"
        )


def _bars(chart: Chart, series: Series, number: int, across: Scale, up: Scale) -> Iterator[str]:
    several = len(chart.series)
    unit = across(1) - across(0) if len(chart.ticks) > 1 else (WIDTH - _LEFT - _RIGHT) / 3
    wide = unit * 0.8 / several
    for x, y in zip(series.x, series.y, strict=True):
        if y is None:
            continue
        left = across(x) + wide * (number - several / 2)
        top, ground = min(up(y), up(0)), max(up(y), up(0))
        said = f"{series.name}, {chart.ticks[int(x)]}: {y:{chart.form}}"
        yield (
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{wide:.1f}" height="{ground - top:.1f}" '
            f'fill="{_colour(number)}"><title>{_escaped(said)}</title></rect>'
        )


def _steps(chart: Chart, series: Series, number: int, across: Scale, up: Scale) -> Iterator[str]:
    colour, ground = _colour(number), up(0)
    path = [f"M{across(series.x[0]):.1f},{ground:.1f}"]
    for start, end, y in zip(series.x, series.x[1:], series.y, strict=False):
        height = up(y or 0.0)
        path.append(f"L{across(start):.1f},{height:.1f}L{across(end):.1f},{height:.1f}")
    path.append(f"L{across(series.x[-1]):.1f},{ground:.1f}")
    filled = ".32" if len(chart.series) == 1 else ".08"
    yield (
        f'<path d="{"".join(path)}" fill="{colour}" fill-opacity="{filled}" stroke="{colour}" '
        f'stroke-width="1.6"><title>{_escaped(series.name)}</title></path>'
    )


_KINDS = {"line": _line, "points": _points, "bars": _bars, "steps": _steps}


def _legend(chart: Chart) -> str:
    if len(chart.series) < 2:
        return ""
    items = "".join(
        f'<li><i style="background:{_colour(number)}"></i>{_escaped(series.name)}</li>'
        for number, series in enumerate(chart.series)
    )
    return f'<ul class="legend">{items}</ul>'


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _number(value: float) -> str:
    """A tick's number.

    >>> _number(0.05), _number(20000.0), _number(1e-6)
    ('0.05', '20,000', '1e-6')
    """
    if value and abs(value) < 1e-3:
        mantissa, _, power = f"{value:.0e}".partition("e")
        return f"{mantissa}e{int(power)}"
    return f"{value:,.10g}"


def _escaped(text: str) -> str:
    return html.escape(plain_visible(text), quote=True)
