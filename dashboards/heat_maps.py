"""Pictures with a feature's activations on them, as HTML: everything from outside is escaped."""

import base64
from collections.abc import Mapping, Sequence
from html import escape

from dashboards.amounts import amount
from store.pictures import Grid
from store.results import Example

_WIDTH = "168px"
"""of a picture as shown"""
_COLOUR = "235,110,20"


def pictures_html(
    examples: Sequence[Example],
    images: Mapping[int, bytes | None],
    grid: Grid,
    strongest: float,
    *,
    heat: bool = True,
    width: str = _WIDTH,
) -> str:
    """A grid of pictures, a heat map over each; hovering a cell says where and how much.

    Args: examples have the activations of whole sequences; images are JPEG, by document; strongest
    is the activation that has the full colour; width is a picture's, in CSS.
    """
    cards = [
        _card(each, images.get(each.document), grid, strongest, heat, width) for each in examples
    ]
    return (
        '<div style="display:flex;flex-wrap:wrap;gap:14px;padding:4px 0">'
        + "".join(cards)
        + "</div>"
    )


def _card(
    example: Example, image: bytes | None, grid: Grid, strongest: float, heat: bool, width: str
) -> str:
    if image is None:
        ground = '<div style="width:100%;aspect-ratio:1;background:rgba(128,128,128,0.15)"></div>'
    else:
        data = base64.b64encode(image).decode("ascii")
        ground = (
            f'<img alt="{escape(example.title, quote=True)}" src="data:image/jpeg;base64,{data}" '
            'style="width:100%;display:block">'
        )
    cells = _cells(example, grid, strongest) if heat else ""
    title = escape(example.title) or "&nbsp;"
    return (
        f'<figure style="width:{width};margin:0">'
        f'<div style="position:relative;border-radius:4px;overflow:hidden">{ground}{cells}</div>'
        '<figcaption style="font-size:12px;line-height:1.4;opacity:0.85;overflow:hidden;'
        'text-overflow:ellipsis;white-space:nowrap" '
        f'title="{escape(example.title, quote=True)}"><b>{amount(example.activation)}</b> {title}'
        "</figcaption></figure>"
    )


def _cells(example: Example, grid: Grid, strongest: float) -> str:
    """The heat map: a cell a position, at the example's own a frame."""
    cells = []
    for position, value in enumerate(example.activations[grid.first :], grid.first):
        share = 0.0 if strongest <= 0 else min(value / strongest, 1.0)
        frame = "outline:2px solid #fff;outline-offset:-2px;" if position == example.index else ""
        name = escape(grid.name(position), quote=True)
        cells.append(
            f'<div title="{name} {amount(value)}" '
            f'style="{frame}background:rgba({_COLOUR},{0.75 * share:.3f})"></div>'
        )
    return (
        '<div style="position:absolute;inset:0;display:grid;'
        f"grid-template-columns:repeat({grid.columns},1fr);"
        f'grid-template-rows:repeat({grid.rows},1fr)">{"".join(cells)}</div>'
    )
