"""Site names and patterns."""

import pytest

from activations.sites import is_pattern, layer_of, matches, select, unknown_site
from saescope.errors import InputError

SITES = [
    "hook_embed",
    *(f"blocks.{n}.{h}" for n in range(13) for h in ("hook_resid_post", "attn.hook_z")),
]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*", SITES),
        ("hook_embed", ["hook_embed"]),
        ("blocks.*.hook_resid_post", [f"blocks.{n}.hook_resid_post" for n in range(13)]),
        ("blocks.4-6.attn.hook_z", [f"blocks.{n}.attn.hook_z" for n in (4, 5, 6)]),
        ("blocks.0,11-12.attn.hook_z", [f"blocks.{n}.attn.hook_z" for n in (0, 11, 12)]),
        ("blocks.1.*", ["blocks.1.hook_resid_post"]),
        ("blocks.1.*.*", ["blocks.1.attn.hook_z"]),
        ("blocks.1?.hook_resid_post", [f"blocks.{n}.hook_resid_post" for n in (10, 11, 12)]),
    ],
)
def test_patterns(pattern: str, expected: list[str]) -> None:
    assert [site for site in SITES if matches(site, pattern)] == expected
    assert select([pattern], SITES, where="model") == expected


def test_several_patterns_give_each_site_once_in_the_models_order() -> None:
    patterns = ["blocks.2-3.attn.hook_z", "blocks.1-2.attn.hook_z"]
    assert select(patterns, SITES, where="model") == [f"blocks.{n}.attn.hook_z" for n in (1, 2, 3)]


def test_a_pattern_without_match_names_what_there_is() -> None:
    with pytest.raises(InputError, match=r"blocks\.20-30.*blocks\.\d+\.hook_resid_post"):
        select(["blocks.20-30.hook_resid_post"], SITES, where="model")


def test_what_is_a_pattern() -> None:
    patterns = ["*", "blocks.*.hook_z", "blocks.1-2.hook_z", "blocks.1,2.hook_z", "blocks.?.hook_z"]
    assert all(map(is_pattern, patterns))
    assert not any(map(is_pattern, ["blocks.1.hook_z", "hook_embed", "module:a.1-2.*:output"]))


def test_layer_of() -> None:
    assert [layer_of(s) for s in ("blocks.12.attn.hook_z", "hook_embed")] == [12, None]


def test_an_unknown_site_names_the_nearest_and_the_last_layer() -> None:
    message = str(unknown_site("blocks.40.hook_resid_post", SITES, where="tiny"))
    assert "tiny" in message
    assert "last layer is 12" in message
    assert "hook_resid_post" in message.split("allowed")[1]
