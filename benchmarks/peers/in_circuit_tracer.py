"""Features, reconstructions and an attribution graph by circuit-tracer; runs in its environment.

    python in_circuit_tracer.py SETTINGS.json

Reads a set of transcoders and a cross-layer transcoder that saescope exported in its layout, and
encodes and decodes the same rows; then attributes a prompt's next token through the set. All of it
is the library's own code.
"""

import importlib.metadata
import json
import sys
import time
from pathlib import Path

import torch
import yaml
from circuit_tracer import ReplacementModel, attribute
from circuit_tracer.graph import compute_graph_scores, compute_node_influence
from circuit_tracer.transcoder.cross_layer_transcoder import load_clt
from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set
from safetensors.torch import load_file, save_file
from transformer_lens import loading_from_pretrained
from transformers import AutoTokenizer, PreTrainedTokenizerFast

OPTIONS = {"device": torch.device("cpu"), "dtype": torch.float32}
EAGER = {**OPTIONS, "lazy_encoder": False, "lazy_decoder": False}


def main(settings: dict) -> None:
    """Write tensors of what it computes, and facts of the graph."""
    torch.set_num_threads(settings["threads"])
    hooks, out = {}, {}
    for name in ("set", "clt"):
        config = yaml.safe_load((Path(settings[name]) / "config.yaml").read_text(encoding="utf-8"))
        hooks[name] = {key: config[key] for key in ("feature_input_hook", "feature_output_hook")}
    layers = len(list(Path(settings["set"]).glob("layer_*.safetensors")))
    paths = {n: f"{settings['set']}/layer_{n}.safetensors" for n in range(layers)}
    transcoders = load_transcoder_set(paths, scan="ours", **hooks["set"], **EAGER)
    clt = load_clt(settings["clt"], scan="ours", **hooks["clt"], **EAGER)
    rows = load_file(settings["rows"])
    with torch.no_grad():
        for name, each in (("set", transcoders), ("clt", clt)):
            features = each.encode(rows[name])
            out[f"{name}_features"] = features
            out[f"{name}_reconstruction"] = each.decode(features, rows[name])
    save_file({name: value.contiguous() for name, value in out.items()}, settings["tensors"])
    found = {"version": importlib.metadata.version("circuit-tracer")}
    Path(settings["results"]).write_text(json.dumps(found | graph_of(settings, transcoders)))


def graph_of(settings: dict, transcoders: object) -> dict:
    """Nodes of a prompt's graph by influence, its scores, and how long it took."""
    folder = str(readable(settings))
    # a folder is read as a model of the hub is, but must be known by its name
    loading_from_pretrained.OFFICIAL_MODEL_NAMES.append(folder)
    use_rotary_base(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = ReplacementModel.from_pretrained_and_transcoders(
        folder, transcoders, tokenizer=tokenizer, **OPTIONS
    )
    began = time.perf_counter()
    graph = attribute(
        settings["prompt"],
        model,
        max_n_logits=settings["max_outputs"],
        desired_logit_prob=settings["probability"],
        batch_size=128,
        max_feature_nodes=settings["max_features"],
    )
    seconds = time.perf_counter() - began
    weight = torch.zeros(len(graph.adjacency_matrix))
    weight[-len(graph.logit_probabilities) :] = graph.logit_probabilities
    influence = compute_node_influence(graph.adjacency_matrix, weight)
    chosen = graph.active_features[graph.selected_features]
    replacement, completeness = compute_graph_scores(graph)
    return {
        "seconds": seconds,
        "active": len(graph.active_features),
        "probabilities": graph.logit_probabilities.tolist(),
        "features": chosen.tolist(),  # layer, position, feature
        "activations": graph.activation_values[graph.selected_features].tolist(),
        "influence": influence[: len(chosen)].tolist(),
        "replacement": float(replacement),
        "completeness": float(completeness),
    }


def use_rotary_base(folder: str) -> None:
    """TransformerLens 3.2 takes 10,000 for every Llama that it does not know by name."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    known = loading_from_pretrained.convert_hf_model_config

    def convert(*args: object, **options: object) -> dict:
        return {**known(*args, **options), "rotary_base": int(config["rope_theta"])}

    loading_from_pretrained.convert_hf_model_config = convert


def readable(settings: dict) -> Path:
    """The model's folder with a configuration and a tokenizer as transformers 4 reads them."""
    given, folder = Path(settings["model"]), Path(settings["results"]).parent / "model"
    folder.mkdir()
    config = json.loads((given / "config.json").read_text(encoding="utf-8"))
    config.setdefault("rope_theta", config.get("rope_parameters", {}).get("rope_theta", 10_000.0))
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for path in given.glob("*.safetensors*"):
        (folder / path.name).symlink_to(path)
    PreTrainedTokenizerFast(
        tokenizer_file=str(given / "tokenizer.json"), **settings["special_tokens"]
    ).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
