"""Site names and patterns."""

import pytest

from activations.sites.names import full_name, is_pattern, layer_of, matches, select, unknown_site
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
    assert all(map(is_pattern, [*patterns, "module:a.1-2.b:output", "module:a.*:input"]))
    assert not any(map(is_pattern, ["blocks.1.hook_z", "hook_embed", "module:a.1.b:output"]))


@pytest.mark.parametrize(
    ("short", "full"),
    [
        ("resid_post:*", "blocks.*.hook_resid_post"),
        ("z:4-12", "blocks.4-12.attn.hook_z"),
        ("mlp_out:0,3,6-8", "blocks.0,3,6-8.hook_mlp_out"),
        ("mlp_pre:7", "blocks.7.mlp.hook_pre"),
        ("ln2:*", "blocks.*.ln2.hook_out"),
        ("embed", "hook_embed"),
        ("ln_final", "ln_final.hook_out"),
        ("blocks.4.hook_resid_post", "blocks.4.hook_resid_post"),
        ("module:a.1.b:update", "module:a.1.b:update"),
    ],
)
def test_short_names(short: str, full: str) -> None:
    assert full_name(short) == full


@pytest.mark.parametrize("site", ["z", "z:", "z:x", "z:4-", "resid_pots:4", "embed:3", "ln:*"])
def test_what_is_no_short_name(site: str) -> None:
    with pytest.raises(InputError, match=r"no such short name.*resid_pre, .*z:0,4-12"):
        full_name(site)


def test_patterns_of_modules() -> None:
    modules = [f"module:layer.{n}.{name}:output" for n in range(12) for name in ("a", "b")]
    assert select(["module:layer.9-11.a:output"], modules, where="m") == modules[18::2]
    assert select(["module:layer.*.b:output"], modules, where="m") == modules[1::2]
    assert not matches(modules[0], "module:layer.*.a:input")
    assert not matches(modules[0], "*")


def test_a_range_beyond_the_last_layer_is_an_error() -> None:
    with pytest.raises(InputError, match="layer 13: its last layer is 12"):
        select(["blocks.4-13.hook_resid_post"], SITES, where="model")


def test_layer_of() -> None:
    assert [layer_of(s) for s in ("blocks.12.attn.hook_z", "hook_embed")] == [12, None]


def test_an_unknown_site_names_the_nearest_and_the_last_layer() -> None:
    message = str(unknown_site("blocks.40.hook_resid_post", SITES, where="tiny"))
    assert "tiny" in message
    assert "last layer is 12" in message
    assert "hook_resid_post" in message.split("allowed")[1]
