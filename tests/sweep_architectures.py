"""Every causal architecture of transformers, tiny and random: which sites are read, do they add?

    python -m tests.sweep_architectures            # writes the table of docs/reports/models.md

A model's own sums and logits are the reference: blocks' outputs as transformers gives them
(`output_hidden_states`), and the logits, to which the last norm and the unembedding must lead.
"""

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

TABLE = Path("docs/reports/models.md")
_BEGIN, _END = "<!-- table: begin -->", "<!-- table: end -->"
_UNKNOWN = "TransformerLens has no adapter for"
_MOST_PARAMETERS = 5_000_000
_PARTS = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
_WIDTH, _VOCABULARY, _CONTEXT = 32, 300, 64

# every name that some configuration has for a size; those that it does not have are left out
_SIZES: dict[str, Any] = {
    "hidden_size": _WIDTH, "n_embd": _WIDTH, "d_model": _WIDTH, "embed_dim": _WIDTH,
    "word_embed_proj_dim": _WIDTH, "attention_hidden_size": _WIDTH, "lru_width": _WIDTH,
    "num_hidden_layers": 3, "n_layer": 3, "n_layers": 3, "num_layers": 3, "decoder_layers": 3,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "decoder_attention_heads": 4, "attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "d_kv": 8,
    "intermediate_size": 48, "n_inner": 48, "ffn_dim": 48, "ffn_hidden_size": 48,
    "decoder_ffn_dim": 48, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
    "max_position_embeddings": _CONTEXT, "n_positions": _CONTEXT, "max_seq_len": _CONTEXT,
    "vocab_size": _VOCABULARY, "vocab_size_per_layer_input": _VOCABULARY,
    "hidden_size_per_layer_input": 4, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_k": 2, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "index_n_heads": 2, "index_head_dim": 8,
    "index_topk": 4, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16,
    "mamba_expand": 2, "state_size": 8, "time_step_rank": 4, "rotary_dim": 8,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"head_dim": None},
    {"v_head_dim": None, "head_dim": None},
    {"head_dim": None, "num_key_value_heads": 4},
    {"head_dim": None, "attn_layer_indices": [1]},
    {"head_dim": None, "layer_types": ["mamba", "attention", "mamba"]},
    {"layer_types": ["conv", "full_attention", "conv"]},
    {"mamba_d_ssm": 64},
    dict.fromkeys(_LAYERS, 4),
    {**dict.fromkeys(_LAYERS, 4), "head_dim": None},
    {**dict.fromkeys(_LAYERS, 8), "head_dim": None, "attn_layer_period": 4, "attn_layer_offset": 1},
    {"head_dim": None, "attention_types": [[["global", "local"], 2]], **dict.fromkeys(_LAYERS, 4)},
    {"num_heads": 8, "head_dim": 8},
)
"""Changes to the sizes that some architectures want; None leaves a size as it is by default."""


@dataclass
class Row:
    """What was found out about one architecture."""

    name: str
    refused: str = ""
    """why it is not loaded at all, or not run tiny"""
    sites: list[str] = field(default_factory=list)
    """named sites of a block that every layer has"""
    some_layers: list[str] = field(default_factory=list)
    """those that some layers have"""
    why_not: dict[str, str] = field(default_factory=dict)
    """sites that there are not, and why"""
    sums: str = ""
    """how the parts of blocks add up"""
    problems: list[str] = field(default_factory=list)
    """what is listed and wrong"""


def causal() -> dict[str, str]:
    """The architectures that transformers calls causal, and a kind of model of each."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    found: dict[str, str] = {}
    for kind, name in NAMES.items():
        found.setdefault(name if isinstance(name, str) else name[0], kind)
    return found


def tiny_configs(kind: str) -> Any:
    """Small configurations of a kind of model, some of which it can be made of."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    cls: Any = CONFIG_MAPPING[kind]
    for change in _VARIANTS:
        sizes = {k: v for k, v in {**_SIZES, **change}.items() if v is not None}
        try:
            default = cls()
            text = default.get_text_config()
            own = {k: v for k, v in sizes.items() if hasattr(text, k)}
            if text is default:
                yield cls(**own)
            else:
                part = next(k for k, v in vars(default).items() if v is text)
                yield cls(**{part: own})
        except Exception as error:  # each has conditions of its own
            yield error


def tiny_model(kind: str) -> Any:
    """A random model of a kind that runs; an exception that says why there is none."""
    from transformers import AutoModelForCausalLM

    why: Exception = ValueError("no configuration")
    for config in tiny_configs(kind):
        if isinstance(config, Exception):
            why = config
            continue
        try:
            with torch.device("meta"):
                large = AutoModelForCausalLM.from_config(config)
            count = sum(parameter.numel() for parameter in large.parameters())
            if count > _MOST_PARAMETERS:
                raise ValueError(f"has {count:,} parameters at the least")
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
                model(input_ids=torch.arange(5, 11).view(2, 3))
        except Exception as error:
            why = error
        else:
            return model
    return why


def row_of(name: str, kind: str) -> Row:
    """Load, read and compare one architecture."""
    from activations.models.language import Model
    from saescope.errors import InputError

    row = Row(name)
    hf = tiny_model(kind)
    if isinstance(hf, Exception):
        row.refused = "not tried: " + _line(hf)
        return row
    try:
        model = Model(hf, None, spec=name, folder=Path())
        sites = model.sites()
    except InputError as error:
        row.refused = _line(error).removeprefix(f"{name}: ")
        return row
    layers = range(model.n_layers)
    counted = Counter(s.split(".", 2)[2] for s in sites if s.startswith("blocks."))
    row.sites = [s for s in sites if not s.startswith("blocks.")]
    row.sites += [s for s, n in counted.items() if n == len(layers)]
    row.some_layers = [s for s, n in counted.items() if n < len(layers)]
    found = model.site_map.readable
    row.why_not = {s.split(".", 2)[2] if s.startswith("blocks.") else s: why
                   for s, why in found.refused.items()}  # fmt: skip
    row.why_not = {s: why for s, why in row.why_not.items() if s not in {*row.sites, *counted}}
    row.sums = ", ".join(sorted({each for each in found.sums.values() if each}))
    row.problems = problems_of(model, sites)
    try:
        model.unembedding()
    except Exception as error:
        row.why_not["unembedding"] = _line(error).removeprefix(f"{name}: ")
    return row


def problems_of(model: Any, sites: list[str]) -> list[str]:
    """What of a model's sites is not what the model itself computes."""
    problems: list[str] = []
    tokens = torch.randint(3, _VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    have: dict[str, torch.Tensor] = {}
    for site in sites:
        try:
            have[site] = model.capture(tokens, [site])[site]
        except Exception as error:
            problems.append(f"{site}: listed and not read: {_line(error)}")
    together = {} if problems else model.capture(tokens, sites)
    for site, x in together.items():
        if not torch.equal(x, have[site]) and _off(x, have[site]):
            problems.append(f"{site}: differs where others are read, too")
    with torch.no_grad():
        out = model.hf(tokens, output_hidden_states=True, use_cache=False)
    states = list(out.hidden_states or ())
    if len(states) == model.n_layers + 1:
        pre = have.get("blocks.0.hook_resid_pre")
        first = 0 if pre is None or not _off(pre, states[0]) else -1  # some begin after a block
        for layer in range(model.n_layers - 1):  # the last one has the final norm behind it
            x, state = have.get(f"blocks.{layer}.hook_resid_post"), states[layer + 1 + first]
            if x is not None and x.shape == state.shape and _off(x, state):
                problems.append(f"blocks.{layer}.hook_resid_post: is not the hidden state")
    for layer in range(model.n_layers):
        problems += _wrong_sums(model, layer, have)
    return problems


def _wrong_sums(model: Any, layer: int, have: dict[str, torch.Tensor]) -> list[str]:
    pre, attn, mid, mlp, post = (have.get(f"blocks.{layer}.hook_{name}") for name in _PARTS)
    how = model.site_map.readable.sums.get(layer, "")
    wrong: list[str] = []
    if pre is None or post is None:
        return wrong
    if how == "parallel" and attn is not None and mlp is not None:
        wrong += ["resid_pre + attn_out + mlp_out"] if _off(pre + attn + mlp, post) else []
    if how == "sequential":
        if attn is not None and mid is not None and _off(pre + attn, mid):
            wrong.append("resid_pre + attn_out")
        if mlp is not None and mid is not None and _off(mid + mlp, post):
            wrong.append("resid_mid + mlp_out")
    return [f"blocks.{layer}: {each} is not what follows" for each in wrong]


def _off(a: Any, b: Any) -> bool:
    return a.shape != b.shape or float((a - b).norm()) > 1e-3 * float(b.norm())


def _line(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    named = type(error).__name__ if not text else ""
    return (named + text)[:160]


def sweep(names: dict[str, str]) -> list[Row]:
    """The rows of some architectures."""
    rows = []
    for name, kind in names.items():
        try:
            row = row_of(name, kind)
        except Exception as error:  # one that nobody expects is a problem of its own
            row = Row(name, problems=[f"{type(error).__name__}: {_line(error)}"])
        rows.append(row)
        sys.stderr.write(f"{name}: {row.refused or row.problems or row.sums}\n")
    return rows


def table(rows: list[Row]) -> str:
    """The table of docs/reports/models.md."""
    lines = [
        "| architecture | sites of every block | of some | sums | not there, and why |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda each: each.name.lower()):
        if row.refused:
            continue
        why: dict[str, list[str]] = {}
        for site, reason in row.why_not.items():
            why.setdefault(reason, []).append(_short(site))
        refused = "; ".join(f"{', '.join(sites)}: {reason}" for reason, sites in why.items())
        always, some = (", ".join(map(_short, each)) for each in (row.sites, row.some_layers))
        cells = (row.name, always, some, row.sums or "not known", refused)
        lines.append("| " + " | ".join(cells) + " |")
    unknown = [row.name for row in rows if _UNKNOWN in row.refused]
    left = [row for row in rows if row.refused and row.name not in unknown]
    lines += ["", "| refused, or not tried | why |", "|---|---|"]
    lines += [f"| {row.name} | {row.refused.replace('|', '/')} |" for row in left]
    lines += [
        "",
        f"{_UNKNOWN} these, so they are refused in one line: {', '.join(sorted(unknown))}.",
    ]
    return "\n".join(lines)


def _short(site: str) -> str:
    return (
        site.replace("hook_", "").replace("attn.", "").replace(".out", "").replace("mlp.", "mlp_")
    )


def main() -> None:
    """Write the table into the documentation."""
    import transformers

    transformers.logging.set_verbosity_error()
    rows = sweep(causal())
    for row in rows:
        for problem in row.problems:
            sys.stderr.write(f"WRONG {row.name}: {problem}\n")
    before, _, rest = TABLE.read_text(encoding="utf-8").partition(_BEGIN)
    after = rest.partition(_END)[2]
    TABLE.write_text(f"{before}{_BEGIN}\n{table(rows)}\n{_END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
