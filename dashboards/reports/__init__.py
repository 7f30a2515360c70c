"""Reports of evaluations: put together once, shown as HTML, as Markdown, or on a page.

`measured` reads evaluations, `content` makes tables and charts of them, `drawing`, `html_page` and
`markdown` write those, and the explorer's page Evaluation shows them.
"""
