"""Attribution graphs made by hand, with sums that can be checked on paper."""

from typing import Any

import numpy as np

from sae.circuits.graph import EMBEDDING, ERROR, FEATURE, LOGIT, Graph

TOKENS = ["<|begin|>", "</script><b>x</b>", "\n", " �"]
"""BOS, markup, a line's end, and a piece of a character"""


def hand_graph(**fields: Any) -> Graph:
    """Five features at two sites and four tokens.

    Token 1 -> feature 3 (4) -> feature 5 (-1) -> output 0 (6), token 3 -> feature 11 (3) -> output
    0 (2), feature 9 (1) at token 2 from the token (5), to feature 5 (2), feature 3 at token 3 (0.5)
    from token 3 (1) to output 1 (1), and an error at site 1 with -1 to output 0.

    Nodes: features 0 to 4 (3 at 1, 9 at 2, 3 at 3, 5 at 3, 11 at 3), error 5, tokens 6 to 9,
    outputs 10 and 11.
    """
    adjacency = np.zeros((12, 12))
    adjacency[0, 7] = 4
    adjacency[1, 8] = 5
    adjacency[2, 9] = 1
    adjacency[3, [0, 1]] = [-1, 2]
    adjacency[4, 9] = 3
    adjacency[10, [3, 4, 5]] = [6, 2, -1]
    adjacency[11, 2] = 1
    kind = [FEATURE] * 5 + [ERROR] + [EMBEDDING] * 4 + [LOGIT] * 2
    given: dict[str, Any] = {
        "prompt": "</script><b>x</b>\n �", "token_ids": [1, 8, 9, 10], "tokens": TOKENS,
        "model": "tiny-llama", "n_layers": 2,
        "sites": ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"],
        "saes": ["runs/other", "runs/tiny"], "method": "linear", "kind": kind,
        "site": [0, 0, 0, 1, 1, 1, -1, -1, -1, -1, -1, -1],
        "layer": [0, 0, 0, 1, 1, 1, -1, -1, -1, -1, 2, 2],
        "position": [1, 2, 3, 3, 3, 3, 0, 1, 2, 3, 3, 3],
        "number": [3, 9, 3, 5, 11, -1, 1, 8, 9, 10, 20, 21],
        "activation": [4, 5, 0.5, 1.5, 3, 1, 1, 1, 1, 1, 0.75, 0.25],
        "value": [4, 5, 1, 1, 3, 0, 0, 0, 0, 0, 7, 1], "bias": np.zeros(12),
        "weight": [0] * 10 + [0.75, 0.25], "influence": np.zeros(12), "cumulative": np.ones(12),
        "adjacency": adjacency, "labels": {"0_9_2": "line <end> & more"},
        "facts": {"logit_tokens": {"20": " <b>yes</b>", "21": " no"}},
    }  # fmt: skip
    return Graph(**{**given, **fields})
