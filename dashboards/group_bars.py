"""Topics and sources in which a feature fires more often than by chance, as bars in HTML."""

import html
from collections.abc import Sequence
from urllib.parse import urlencode

from dashboards.amounts import counted
from dashboards.figures import BLUE, percent
from dashboards.tokens import visible
from store.fact_results import Enrichment

KINDS = {"topic": "Topics", "source": "Sources"}
_TRACK = "position:relative;height:7px;border-radius:4px;background:rgba(128,128,128,.18)"


def group_parameter(kind: str, name: str) -> str:
    """A group as the Features page's address has it.

    >>> group_parameter("topic", "Arts")
    'topic:Arts'
    """
    return f"{kind}:{name}"


def groups_html(groups: Sequence[Enrichment], sae: str | None = None) -> str:
    """A row a group: its name, a bar of its share of the feature's positions with a mark at what is
    expected, and the numbers.

    sae: the store's name, for links to the features of each group; without it there are none.
    """
    rows = "".join(_row(each, sae) for each in groups)
    return f'<div style="display:flex;flex-direction:column;gap:.7rem;padding:.1rem 0">{rows}</div>'


def _row(group: Enrichment, sae: str | None) -> str:
    name = visible(group.name)
    if sae is not None:
        group_of = group_parameter(group.kind, group.name)
        address = f"features?{urlencode({'sae': sae, 'group': group_of})}"
        name = (
            f'<a href="{html.escape(address, quote=True)}" target="_self" '
            f'title="All features of this {group.kind}" style="color:inherit">{name}</a>'
        )
    bar = (
        f'<div style="{_TRACK}"><div style="height:100%;border-radius:4px;background:{BLUE};'
        f'width:{100 * group.share:.1f}%"></div><div title="expected" style="position:absolute;'
        f"left:{100 * group.expected_share:.1f}%;top:-3px;bottom:-3px;width:2px;"
        'background:currentColor;opacity:.6"></div></div>'
    )
    numbers = (
        f"{percent(group.share)} of its positions, {percent(group.expected_share)} expected · in "
        f"{counted(group.documents, 'document')}, {group.expected:,.3g} expected · "
        f"q {group.q:.1e}"
    )
    return (
        '<div><div style="display:flex;justify-content:space-between;gap:1rem;font-size:.9rem;'
        f'padding-bottom:.2rem"><span style="overflow-wrap:anywhere">{name}</span>'
        f'<b style="font-variant-numeric:tabular-nums">{percent(group.share)}</b></div>{bar}'
        f'<div style="font-size:.78rem;opacity:.7;padding-top:.2rem">{numbers}</div></div>'
    )
