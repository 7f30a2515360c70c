"""attention.json: what `saescope attention` measured, sealed by its own sha256.

It has how it was measured (`protocol`), a row a head (`heads`, as `head_table.HeadRow`), a column a
property of features (`features`), and prefix-length tests of some features (`prefix`) and of all
heads of the layer (`prefix_heads`). It is in the folder of the run.
"""

from functools import partial
from typing import Any

from sae.evaluation.written import is_of_kind, read_of_kind
from saescope.paths import AnyPath
from saescope.replacing import Kind

ATTENTION_FILE = "attention.json"
SCHEMA = 1
KIND = "attention"
ATTENTION_KIND = Kind("what `saescope attention` measured", partial(is_of_kind, kind=KIND))


def read_attention(path: AnyPath) -> dict[str, Any]:
    """What was measured; ArtefactError if the file is missing, damaged, newer or another one."""
    return read_of_kind(path, KIND, schema=SCHEMA, wrong="is no result of `saescope attention`")
