"""Tokens and examples as HTML: every text is escaped, invisible characters are made visible."""

import html
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import count
from urllib.parse import urlencode

from dashboards.amounts import amount
from store.results import Example, Occurrences

HOT, COLD = (235, 122, 28), (61, 126, 196)
_JOINERS = "\u200c\u200d"  # scripts and emoji need these inside words
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|<>$:~&^=\"'])")
_TITLE_LENGTH = 70
_TOKEN_LENGTH = 32  # of texts that are remembered; what is longer is no token
_WAYS = 8
_ANOTHER = "another document"

STYLE = """<style>
[data-testid=stTopNavLink]{padding:0 5px}
@media (max-width:1500px){[data-testid=stTopNavLink]>:has([data-testid^=stIcon]){display:none}}
.stMainBlockContainer{padding:4.5rem 3rem 2rem;max-width:1760px}
.stMainBlockContainer h2{font-size:1.65rem;padding:.5rem 0 .3rem}
.stMainBlockContainer h3{font-size:1.3rem;padding:.8rem 0 .2rem}
.stMainBlockContainer h5{font-size:1.02rem;padding:.5rem 0 .3rem}
.stMainBlockContainer [data-testid=stMetricValue]{font-size:1.45rem}
.stMainBlockContainer a[aria-label="Link to heading"]{display:none}
@media (max-width:640px){.stMainBlockContainer{padding:4rem 1rem 2rem}
.stMainBlockContainer .stHorizontalBlock{gap:.6rem}}
[data-testid=stToastContainer]{inset:auto 1rem 1rem auto!important}
.st-key-relatives,.st-key-marked{gap:.12rem}
.st-key-relatives h5{padding:1rem 0 1.4rem}
.st-key-relatives a,.st-key-marked a{background:none!important;padding:.1rem 0}
.st-key-relatives a *,.st-key-marked a *{font-weight:400!important}
.st-key-relatives a:hover *,.st-key-marked a:hover *{text-decoration:underline}
.ss-ex{display:grid;grid-template-columns:3.2rem minmax(0,1fr) 8rem;gap:.8rem;align-items:baseline;
padding:.42rem .2rem;border-bottom:1px solid rgba(128,128,128,.18)}
.ss-ex:last-child{border-bottom:none}
.ss-act{text-align:right;font-variant-numeric:tabular-nums;font-weight:600;font-size:.85rem}
.ss-from{font-size:.76rem;opacity:.62;white-space:nowrap;overflow:hidden;text-overflow:ellipsis}
.ss-text{font-size:.92rem;line-height:1.75;white-space:pre-wrap;overflow-wrap:anywhere}
.ss-t{position:relative}
.ss-lit{border-radius:3px;padding:.08em 0}
.ss-peak .ss-lit{box-shadow:inset 0 -2px 0 rgb(235,122,28)}
.ss-far{opacity:.42}.ss-mark{opacity:.55;font-size:.85em}
.ss-t:hover{outline:1px solid rgba(128,128,128,.65)}
.ss-t:hover::after{content:attr(data-tip);position:absolute;left:0;top:calc(100% + 3px);z-index:99;
white-space:pre;width:max-content;max-width:22rem;overflow:hidden;text-overflow:ellipsis;
background:#1d2330;color:#f4f5f7;font-size:.76rem;line-height:1.5;padding:.35rem .55rem;
border-radius:5px;box-shadow:0 2px 8px rgba(0,0,0,.35);pointer-events:none}
@supports (position-try-fallbacks:flip-inline){
.ss-t:hover{anchor-name:--ss-tip}
.ss-t:hover::after{position:fixed;position-anchor:--ss-tip;left:auto;top:auto;
position-area:bottom span-right;margin-top:3px;
position-try-fallbacks:flip-inline,flip-block,flip-inline flip-block}
}
.ss-effects{display:grid;grid-template-columns:1fr 1fr;gap:0 1.6rem;font-size:.88rem}
.ss-effects div.ss-row{display:flex;justify-content:space-between;gap:.5rem;padding:.14rem .4rem;
border-radius:3px;margin:1px 0}
.ss-effects b{font-weight:600;font-size:.78rem;opacity:.7;padding:.1rem .4rem}
.ss-num{font-variant-numeric:tabular-nums;opacity:.8}
.ss-tok{white-space:pre;overflow:hidden;text-overflow:ellipsis;
font-family:ui-monospace,SFMono-Regular,Menlo,'DejaVu Sans Mono',monospace;font-size:.84rem}
.ss-facts{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.22rem 1.2rem;
font-size:.88rem}
.ss-facts span:nth-child(odd){opacity:.65}
.ss-facts span:nth-child(even){overflow-wrap:anywhere}
.ss-measured{display:grid;grid-template-columns:minmax(7rem,max-content) max-content minmax(0,1fr);
gap:.35rem 1.2rem;font-size:.88rem;align-items:baseline}
.ss-measured b{font-weight:600;font-variant-numeric:tabular-nums;text-align:right}
.ss-measured span:nth-child(3n){font-size:.8rem;opacity:.7}
@media (max-width:640px){.ss-measured{grid-template-columns:minmax(0,1fr) max-content}
.ss-measured span:nth-child(3n){grid-column:1/-1;padding-bottom:.4rem}}
.ss-per{display:grid;grid-template-columns:3rem minmax(5rem,11rem) minmax(0,1fr);gap:.1rem .9rem;
font-size:.86rem;align-items:baseline}
.ss-chips{display:flex;flex-wrap:wrap;gap:.15rem .4rem;padding:.12rem 0}
.ss-chip,.ss-chip:visited{text-decoration:none!important;color:inherit!important;border-radius:4px;
padding:.02rem .42rem;white-space:nowrap;max-width:17rem;overflow:hidden;text-overflow:ellipsis}
.ss-ways{display:flex;flex-wrap:wrap;gap:.3rem .6rem;align-items:baseline;padding:.3rem 0 .6rem}
.ss-way{background:rgba(128,128,128,.13);font-size:.84rem}
.ss-cut{border-left:1px solid rgba(128,128,128,.7);margin:0 .18rem}
.ss-chip:hover{outline:1px solid rgba(128,128,128,.7)}
.st-key-sql_editor textarea{font-family:ui-monospace,SFMono-Regular,Menlo,monospace;
font-size:.84rem;line-height:1.5}
.ss-schema{font-size:.84rem}
.ss-schema details{border-bottom:1px solid rgba(128,128,128,.18);padding:.3rem 0}
.ss-schema summary{cursor:pointer}
.ss-schema summary span,.ss-columns span:nth-child(3n){opacity:.72}
.ss-columns{display:grid;grid-template-columns:max-content max-content minmax(0,1fr);
gap:.18rem .8rem;padding:.4rem 0 .4rem 1rem;font-size:.8rem}
.ss-columns span:nth-child(3n+2){opacity:.55}
.ss-big .ss-text{font-size:1.02rem;line-height:2}
</style>"""


def visible(text: str) -> str:
    """A text as escaped HTML, with invisible characters made visible.

    Newline is shown as ↵, tab as →, control, bidirectional and other invisible characters by their
    numbers; an empty text (the beginning of a character that a later token completes) as ·.

    >>> visible("<b>\\n")
    '&lt;b&gt;<span class="ss-mark">↵</span>'
    """
    # the same tokens come again and again; documents do not
    return _visible_token(text) if len(text) <= _TOKEN_LENGTH else _visible(text)


def _visible(text: str) -> str:
    if not text:
        return _mark("·")
    if text.isprintable():  # nothing to be made visible
        return html.escape(text, quote=True)
    return "".join(_visible_character(c) for c in text)


@lru_cache(maxsize=1 << 16)
def _visible_token(text: str) -> str:
    return _visible(text)


def _visible_character(character: str) -> str:
    if character == "\n":
        return _mark("↵")
    if character == "\t":
        return _mark("→")
    invisible = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    if invisible and character not in _JOINERS:
        return _mark(f"[U+{ord(character):04X}]")
    return html.escape(character, quote=True)


def _mark(text: str) -> str:
    return f'<span class="ss-mark">{text}</span>'


def plain_visible(text: str) -> str:
    """A text with invisible characters made visible, as plain text for tables and charts.

    >>> plain_visible("a\\n")
    'a↵'
    """
    return _plain_token(text) if len(text) <= _TOKEN_LENGTH else _plain(text)


def _plain(text: str) -> str:
    if text and text.isprintable():
        return text
    return html.unescape(re.sub(r'<span class="ss-mark">|</span>', "", visible(text)))


@lru_cache(maxsize=1 << 16)
def _plain_token(text: str) -> str:
    return _plain(text)


def shortened(text: str, most: int) -> str:
    """A text of at most this many characters; where it is cut, an ellipsis says so.

    >>> shortened("harbour", 7), shortened("harbour", 5)
    ('harbour', 'harb…')
    """
    return text if len(text) <= most else f"{text[: most - 1]}…"


def plain(text: object) -> str:
    """Any text, escaped so that Streamlit's Markdown shows it unchanged.

    >>> plain("a*b")
    'a\\\\*b'
    """
    return _MARKDOWN.sub(r"\\\1", plain_visible(str(text)).replace("↵", " "))


def shade(strength: float) -> str:
    """A background colour for -1 (blue) over 0 (none) to 1 (orange), readable under any text."""
    clamped = min(abs(strength), 1.0)
    if clamped == 0.0:
        return ""
    red, green, blue = HOT if strength > 0 else COLD
    return f"background:rgba({red},{green},{blue},{0.08 + 0.54 * clamped:.3f})"


def token_html(
    text: str, activation: float, scale: float, tip: str, *, peak: bool = False, far: bool = False
) -> str:
    """One token: shaded by activation / scale, with a tooltip; far ones are faded.

    The space that a word begins with is left unshaded: it may end the line before.
    """
    classes = "ss-t" + (" ss-peak" if peak else "") + (" ss-far" if far else "")
    lead, shown = _word(text)
    shown = _lit(shown, activation / scale if scale > 0 else 0.0, peak=peak)
    return f'<span class="{classes}" data-tip="{html.escape(tip, quote=True)}">{lead}{shown}</span>'


def _lit(shown: str, strength: float, *, peak: bool) -> str:
    """A token's text, shaded; of the peak also where there is nothing to shade."""
    style = shade(strength)
    styled = f' style="{style}"' if style else ""
    return f'<span class="ss-lit"{styled}>{shown}</span>' if style or peak else shown


def _word(text: str) -> tuple[str, str]:
    """The space that a word begins with, if it does, and the rest as escaped HTML."""
    lead = " " if text.startswith(" ") and text.strip(" ") else ""
    return lead, visible(text[len(lead) :])


@lru_cache(maxsize=1 << 16)
def _silent_token(text: str) -> tuple[str, str]:
    """Of a token without an activation: the first line of its tip, and all after its tip."""
    said, lead, shown = _lit_token(text)
    return said, f'">{lead}{shown}</span>'


@lru_cache(maxsize=1 << 16)
def _lit_token(text: str) -> tuple[str, str, str]:
    """A token as the first line of a tip, and what `_word` has of it."""
    return html.escape(plain_visible(text), quote=True), *_word(text)


def _breaks(text: str, line_breaks: bool) -> str:
    return "<br>" * text.count("\n") if line_breaks else ""


@lru_cache(maxsize=1 << 12)
def _title(title: str) -> str:
    """A document's title as HTML, short and with what is invisible marked."""
    return html.escape(plain_visible(shortened(title or "untitled", _TITLE_LENGTH)), quote=True)


def example_html(example: Example, scale: float, *, line_breaks: bool = False) -> str:
    """One example: its activation, the tokens around it, the document's title."""
    title = _title(example.title)
    sequence = f"sequence {example.sequence:,}, position "
    # every token as if it had no activation, as nearly all are, of parts escaped before
    silent = f"\nactivation {amount(0.0, 3)}\n{sequence}"
    same = example.same_document
    begins = '<span class="ss-t ss-far" data-tip="', '<span class="ss-t" data-tip="'
    documents = f"\n{_ANOTHER}", f"\n{title}"
    near = zip(count(example.start), same, map(_silent_token, example.tokens))
    spans = [
        f"{begins[here]}{said}{silent}{at}{documents[here]}{end}" for at, here, (said, end) in near
    ]
    peak = example.index - example.start
    for at, activation in enumerate(example.activations):
        if activation or at == peak:
            said, lead, shown = _lit_token(example.tokens[at])
            classes = f"ss-t{' ss-peak' * (at == peak)}{'' if same[at] else ' ss-far'}"
            tip = f"{said}\nactivation {amount(activation, 3)}\n{sequence}{example.start + at}"
            word = _lit(shown, activation / scale if scale > 0 else 0.0, peak=at == peak)
            tip += documents[same[at]]
            spans[at] = f'<span class="{classes}" data-tip="{tip}">{lead}{word}</span>'
    if line_breaks:
        breaks = ("<br>" * text.count("\n") for text in example.tokens)
        spans = [span + line for span, line in zip(spans, breaks, strict=True)]
    return (
        f'<div class="ss-ex"><div class="ss-act">{amount(example.activation)}</div>'
        f'<div class="ss-text">{"".join(spans)}</div>'
        f'<div class="ss-from">{title}</div></div>'
    )


def examples_html(examples: Iterable[Example], scale: float, *, line_breaks: bool = False) -> str:
    """Examples under one another, all shaded on the same scale."""
    return "".join(example_html(e, scale, line_breaks=line_breaks) for e in examples)


def text_html(
    texts: Sequence[str], activations: Sequence[float], scale: float, keep: Sequence[bool]
) -> str:
    """A whole text shaded by one feature; tokens the SAE does not see are faded."""
    spans = []
    for position, (text, activation, kept) in enumerate(zip(texts, activations, keep, strict=True)):
        state = f"activation {amount(activation, 3)}" if kept else "not seen by the SAE"
        tip = f"{plain_visible(text)}\n{state}\nposition {position}"
        spans.append(
            token_html(text, activation, scale, tip, far=not kept) + _breaks(text, line_breaks=True)
        )
    return f'<div class="ss-big"><div class="ss-text">{"".join(spans)}</div></div>'


def steered_html(texts: Sequence[str], prompt: int, edited: Sequence[bool]) -> str:
    """A prompt (faded) and its continuation; tokens at whose positions an edit was made are
    underlined.

    Args: prompt is how many of the tokens are the prompt's.
    """
    spans = []
    for position, (text, steered) in enumerate(zip(texts, edited, strict=True)):
        state = "steered" if steered else "not steered"
        tip = f"{plain_visible(text)}\n{state}\nposition {position}"
        spans.append(
            token_html(text, 0.0, 1.0, tip, peak=steered, far=position < prompt)
            + _breaks(text, line_breaks=True)
        )
    return f'<div class="ss-big"><div class="ss-text">{"".join(spans)}</div></div>'


def effects_html(top: Sequence[tuple], bottom: Sequence[tuple]) -> str:
    """Raised and lowered tokens, each with its effect, and what is said behind that."""
    largest = max((abs(each[1]) for each in [*top, *bottom]), default=0.0)
    colours = {"top": (46, 134, 193), "bottom": (176, 80, 96)}

    def row(effect: tuple | None, side: str) -> str:
        if effect is None:
            return "<span></span>"
        text, value, *more = effect
        red, green, blue = colours[side]
        alpha = 0.34 * abs(value) / largest if largest else 0.0
        return (
            f'<div class="ss-row" style="background:rgba({red},{green},{blue},{alpha:.3f})">'
            f'<span class="ss-tok">{visible(text)}</span>'
            f'<span class="ss-num">{amount(value, signed=True)}{"".join(more)}</span></div>'
        )

    cells = ["<b>raised</b>", "<b>lowered</b>"]
    for index in range(max(len(top), len(bottom))):
        cells.append(row(top[index] if index < len(top) else None, "top"))
        cells.append(row(bottom[index] if index < len(bottom) else None, "bottom"))
    return f'<div class="ss-effects">{"".join(cells)}</div>'


def spellings_html(occurrences: Occurrences) -> str:
    """How often a phrase stands in the corpus, and the ways in which it is cut into tokens."""
    chips = ""
    for way in occurrences.spellings[:_WAYS]:
        ids = ", ".join(map(str, way.token_ids))
        tokens = '<span class="ss-cut"></span>'.join(map(_spaced, way.tokens))
        chips += (
            f'<span class="ss-chip ss-way" title="token ids {ids}"><span class="ss-tok">{tokens}'
            f'</span> <span class="ss-num">{way.count:,}</span></span>'
        )
    more = len(occurrences.spellings) - _WAYS
    rest = f'<span class="ss-from">and {more:,} more ways</span>' if more > 0 else ""
    left_out = occurrences.n_left_out
    unseen = f", and {left_out:,} where no feature fires" if left_out else ""
    times = "occurrence" if occurrences.n == 1 else "occurrences"
    return (
        f'<div class="ss-ways"><b>{occurrences.n:,} {times}</b>'
        f'<span class="ss-from">{unseen}</span>{chips}{rest}</div>'
    )


def _spaced(text: str) -> str:
    """A token on its own, whose spaces can be seen."""
    if not text:
        return visible(text)
    return "".join(_mark("␣") if c == " " else visible(c) for c in text)


def facts_html(facts: Sequence[tuple[str, str]]) -> str:
    """Names and values in two columns."""
    cells = "".join(
        f"<span>{html.escape(name)}</span><span>{visible(value)}</span>" for name, value in facts
    )
    return f'<div class="ss-facts">{cells}</div>'


def measured_html(rows: Sequence[tuple[str, str, str]]) -> str:
    """Metrics: name, value, and what it is, in three columns."""
    cells = "".join(
        f"<span>{html.escape(name)}</span><b>{html.escape(value)}</b><span>{html.escape(text)}</span>"
        for name, value, text in rows
    )
    return f'<div class="ss-measured">{cells}</div>'


def feature_url(sae: str, feature: int) -> str:
    """The address of a feature's page.

    >>> feature_url("a b", 3)
    'feature?sae=a+b&feature=3'
    """
    return f"feature?{urlencode({'sae': sae, 'feature': feature})}"


def per_token_html(
    rows: Sequence[tuple[int, str, Sequence[tuple[int, str, float, float]]]], sae: str
) -> str:
    """Each token with its strongest features: (feature, label, activation, strength 0 to 1)."""
    cells = []
    for position, text, features in rows:
        chips = "".join(
            f'<a class="ss-chip" target="_blank" style="{shade(strength)}" '
            f'href="{html.escape(feature_url(sae, feature), quote=True)}" '
            f'title="{html.escape(plain_visible(label or "no label"), quote=True)}">'
            f"<b>{feature}</b>{' ' + visible(label) if label else ''} "
            f'<span class="ss-num">{amount(activation)}</span></a>'
            for feature, label, activation, strength in features
        )
        cells.append(
            f'<span class="ss-num">{position}</span><span class="ss-tok">{visible(text)}</span>'
            f'<span class="ss-chips">{chips}</span>'
        )
    return f'<div class="ss-per">{"".join(cells)}</div>'
