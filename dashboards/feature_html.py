"""Features as one HTML page that needs nothing else: no script, no server, no other file.

The page forbids itself every request (its content security policy), and all text is escaped by
`dashboards.tokens`.
"""

import html
from collections.abc import Sequence

from dashboards.amounts import amount, span
from dashboards.figures import BLUE, percent
from dashboards.group_bars import groups_html
from dashboards.tokens import STYLE, effects_html, examples_html, facts_html, plain_visible, visible
from store.export.record import FeatureRecord
from store.results import Histogram, Overview

_PAGE_STYLE = """<style>
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;max-width:1180px;
margin:0 auto;padding:1.6rem 1.4rem 3rem;color:#1d2330;background:#fff}
h1{font-size:1.45rem;margin:.2rem 0}h2{font-size:1.3rem;margin:1.6rem 0 .2rem}
h3{font-size:.98rem;margin:1.5rem 0 .4rem}a{color:#2f6f97}
.quiet{opacity:.68;font-size:.86rem;margin:.1rem 0 .4rem}.note{white-space:pre-wrap}
.columns{display:grid;grid-template-columns:minmax(0,5fr) minmax(0,9fr);gap:0 2.6rem}
.related{display:grid;grid-template-columns:minmax(0,1fr) max-content;gap:.12rem 1rem;
font-size:.88rem}
svg{width:100%;height:auto;display:block}svg text{fill:currentColor;opacity:.7;font-size:11px}
@media(max-width:760px){.columns{grid-template-columns:minmax(0,1fr)}
.ss-ex{grid-template-columns:3.2rem minmax(0,1fr)}.ss-from{grid-column:2}}
@media(prefers-color-scheme:dark){body{color:#e6e8ec;background:#12151b}a{color:#7db7dd}}
</style>"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def features_page(records: Sequence[FeatureRecord], overview: Overview, title: str) -> str:
    """One page about these features, with a table of contents if there are several."""
    inside = {record.feature.feature for record in records}
    contents = ""
    if len(records) > 1:
        lines = "".join(
            f'<li><a href="#f{r.feature.feature}">{r.feature.feature}</a> '
            f"{_name(r, r.feature.feature)}</li>"
            for r in records
        )
        contents = f"<ul>{lines}</ul>"
    facts = facts_html(_facts(overview))
    body = "".join(_section(record, inside) for record in records)
    heading = f"<h1>{visible(title)}</h1>" if len(records) > 1 else ""
    return _page(title, f"{heading}{contents}{body}<h3>Where this is from</h3>{facts}")


def index_page(links: Sequence[tuple[str, str]], title: str) -> str:
    """A page with links (address, text) to others."""
    lines = "".join(f'<li><a href="{html.escape(a)}">{visible(t)}</a></li>' for a, t in links)
    return _page(title, f"<h1>{visible(title)}</h1><ul>{lines}</ul>")


def _page(title: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(plain_visible(title))}</title>{STYLE}{_PAGE_STYLE}</head>"
        f"<body>{body}</body></html>\n"
    )


def iframe(address: str, title: str, height: int = 720) -> str:
    """HTML that shows a page inside another.

    >>> iframe("feature-3.html", 'Feature 3 "river"')
    '<iframe src="feature-3.html" title="Feature 3 &quot;river&quot;" width="100%" height="720" \
style="border:0" loading="lazy"></iframe>'
    """
    return (
        f'<iframe src="{html.escape(address)}" title="{html.escape(plain_visible(title))}" '
        f'width="100%" height="{height}" style="border:0" loading="lazy"></iframe>'
    )


def page_title(record: FeatureRecord, name: str) -> str:
    """What a page about one feature is called."""
    label = record.annotation.label
    return f"{name} · feature {record.feature.feature}{f' · {label}' if label else ''}"


def _facts(overview: Overview) -> list[tuple[str, str]]:
    return [
        ("SAE", f"{overview.name} ({overview.architecture}, {overview.d_sae:,} features)"),
        ("Model", overview.model),
        ("Site", overview.site),
        ("Text", f"{overview.n_kept:,} positions of {overview.n_documents:,} documents"),
    ]


def _name(record: FeatureRecord, number: int) -> str:
    """The label of the feature or of a relative, or else its commonest tokens."""
    if number in record.labels:
        return visible(record.labels[number])
    tokens = record.top_tokens[number]
    return " ".join(f'<span class="ss-tok">{visible(token.strip(" "))}</span>' for token in tokens)


def _section(record: FeatureRecord, inside: set[int]) -> str:
    feature = record.feature
    number = feature.feature
    heading = f'<h2 id="f{number}">Feature {number} · {_name(record, number)}</h2>'
    machine = record.machine_label
    if machine is not None and machine.score is not None:
        said = f"{visible(machine.label)} · machine label, score {machine.score:.2f}"
        heading += f'<p class="quiet">{said}</p>'
    note = record.annotation.note
    written = f'<p class="note">{visible(note)}</p>' if note else ""
    if feature.dead:
        return (
            f'<section>{heading}{written}<p class="quiet">Never fires in this store.</p></section>'
        )
    summary = (
        f"fires at {percent(feature.density)} of positions ({feature.n_active:,}), "
        f"documents: {feature.n_documents:,}, strongest {amount(feature.max)}, "
        f"mean {amount(feature.mean)} ± {amount(feature.std)} where it fires"
    )
    left = f"<h3>Activations</h3>{histogram_svg(record.histogram)}{_effects(record)}"
    left += _facts_of(record) + _related(record, inside)
    return (
        f'<section>{heading}<p class="quiet">{summary}</p>{written}<div class="columns">'
        f"<div>{left}</div><div>{_examples(record)}</div></div></section>"
    )


def _effects(record: FeatureRecord) -> str:
    top, bottom = record.logits.top, record.logits.bottom
    if not top and not bottom:
        return ""
    pairs = ([(e.token, e.value) for e in side] for side in (top, bottom))
    return f"<h3>Effect on the next token</h3>{effects_html(*pairs)}"


def _facts_of(record: FeatureRecord) -> str:
    """Topics and sources, layers and attention heads, where the store has them."""
    parts = []
    if record.enrichments:
        parts.append(f"<h3>Topics and sources</h3>{groups_html(record.enrichments)}")
    layers = [(layer.site, each.share) for layer, each in record.layers]
    heads = [(f"head {each.head}", each.share) for each in record.heads]
    titles = ("Share of the feature at each layer", "Share of the decoder's norm in each head")
    for title, rows in zip(titles, (layers, heads), strict=True):
        if rows:
            cells = "".join(
                f"<span>{visible(name)}</span><span>{percent(share)}</span>" for name, share in rows
            )
            parts.append(f'<h3>{title}</h3><div class="related">{cells}</div>')
    return "".join(parts)


def _related(record: FeatureRecord, inside: set[int]) -> str:
    near = [(n.feature, f"cosine {n.cosine:+.2f}") for n in record.neighbours]
    together = [(c.feature, f"r {c.correlation:.2f}") for c in record.coactivating]
    parts = []
    for title, rows in (("Nearest decoder directions", near), ("Fires together with", together)):
        if rows:
            cells = "".join(
                f"<span>{_link(number, inside)} {_name(record, number)}</span><span>{value}</span>"
                for number, value in rows
            )
            parts.append(f'<h3>{title}</h3><div class="related">{cells}</div>')
    return "".join(parts)


def _link(number: int, inside: set[int]) -> str:
    return f'<a href="#f{number}">{number}</a>' if number in inside else str(number)


def _examples(record: FeatureRecord) -> str:
    scale = record.feature.max
    parts = [f"<h3>Strongest examples</h3>{examples_html(record.top, scale)}"]
    for interval in record.intervals:
        share = percent(interval.count / record.feature.n_active)
        parts.append(
            f"<h3>{span(interval.low, interval.high)}</h3>"
            f'<p class="quiet">{interval.count:,} positions ({share})</p>'
            f"{examples_html(interval.examples, scale)}"
        )
    return "".join(parts)


def histogram_svg(histogram: Histogram) -> str:
    """The counts as bars, on a square-root scale, so that rare strong activations can be seen."""
    counts, edges = histogram.counts.tolist(), histogram.edges.tolist()
    most, width, height = max(max(counts), 1), 400.0, 110.0
    step = width / len(counts)
    bars = []
    for index, count in enumerate(counts):
        tall = height * (count / most) ** 0.5
        tip = f"{span(edges[index], edges[index + 1])}: {count:,} positions"
        bars.append(
            f'<rect x="{index * step:.2f}" y="{height - tall:.2f}" width="{step * 0.92:.2f}" '
            f'height="{tall:.2f}" fill="{BLUE}"><title>{tip}</title></rect>'
        )
    return (
        f'<svg viewBox="0 0 {width:.0f} 128" role="img" aria-label="Histogram of activations">'
        f'{"".join(bars)}<text x="0" y="124">0</text>'
        f'<text x="{width / 2:.0f}" y="124" text-anchor="middle">activation '
        f"(heights: square root of positions, most {most:,})</text>"
        f'<text x="{width:.0f}" y="124" text-anchor="end">{amount(edges[-1])}</text></svg>'
    )
