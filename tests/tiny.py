"""Tiny models and harvests that the tests make: random weights, real layouts, no network."""

import json
from pathlib import Path
from typing import Any

import torch

ARCHITECTURES = ("llama", "gpt2", "gpt_neox", "gemma2")
N_CTX = 64
D_MODEL = 32
N_LAYERS = 3

SENTENCES = (
    "The river rose in the night and the bridge at the mill was closed by the morning.",
    "A sparse code uses few of many features, and each of them means one thing.",
    "In 1912 the town had a harbour, two schools, a library and 14,000 people.",
    "She wrote to her brother that the winter was long and that the bread was dear.",
    "Light travels through glass more slowly than through air, and so it bends.",
    "The committee met on Tuesday; nobody could agree about the colour of the doors.",
    "Das Wasser ist kalt, le café est chaud, y el niño duerme: 水 と 火.",
)


def _make_tokenizer(folder: Path, architecture: str) -> Any:
    """A byte-level BPE tokenizer of 320 tokens; only Llama's and Gemma's add a BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    adds_bos = architecture in ("llama", "gemma2")
    special = ["<bos>", "<eos>", "<pad>"] if adds_bos else ["<|endoftext|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    names: dict[str, Any] = {"bos_token": special[0], "eos_token": special[-1]}
    if adds_bos:
        names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 0)]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.save_pretrained(folder)
    return fast


def _make_config(architecture: str, ids: dict[str, Any]) -> Any:
    import transformers

    if architecture == "gpt2":
        return transformers.GPT2Config(
            n_embd=D_MODEL, n_layer=N_LAYERS, n_head=4, n_positions=N_CTX, **ids
        )
    shared: dict[str, Any] = {
        "hidden_size": D_MODEL,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": N_CTX,
        **ids,
    }
    if architecture == "gpt_neox":
        return transformers.GPTNeoXConfig(**shared)
    if architecture == "gemma2":
        return transformers.Gemma2Config(
            **shared, num_key_value_heads=2, head_dim=8, sliding_window=16
        )
    return transformers.LlamaConfig(**shared, num_key_value_heads=2)


def make_tiny_model(folder: str | Path, architecture: str = "llama", seed: int = 0) -> Path:
    """Write a tiny random model as the hub lays one out, and return its folder.

    d_model 32, 3 layers, 4 heads (2 key-value heads for "llama" and "gemma2"), 64 positions, about
    320 tokens. Architectures: "llama", "gpt2", "gpt_neox", "gemma2".
    """
    import transformers

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _make_tokenizer(folder, architecture)
    ids = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = _make_config(architecture, ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            # HF's own initialisation is so small that every layer would look like the identity
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def make_tiny_corpus(folder: str | Path, documents: int = 60) -> Path:
    """Write a JSONL corpus of short documents with titles, and return the file."""
    path = Path(folder) / "corpus.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as stream:
        for number in range(documents):
            first = number % len(SENTENCES)
            text = f"{SENTENCES[first]} {SENTENCES[(first * 3 + number) % 7]} Number {number}."
            stream.write(json.dumps({"title": f"Document {number}", "text": text}) + "\n")
    return path


def make_tiny_harvest(
    folder: str | Path,
    model_folder: str | Path,
    *,
    sites: tuple[str, ...] = ("blocks.1.hook_resid_post",),
    documents: int = 60,
    **fields: Any,
) -> Path:
    """Harvest a tiny model over a tiny corpus (context 16, chunks of 128 rows); the store's folder.

    `fields` are further fields of HarvestConfig.
    """
    from activations import CorpusConfig, HarvestConfig, ModelConfig, harvest

    folder = Path(folder)
    settings: dict[str, Any] = {
        "context": 16, "chunk_rows": 128, "window_chunks": 8, "batch_sequences": 16,
        "held_out_fraction": 0.2, **fields,
    }  # fmt: skip
    config = HarvestConfig(
        model=ModelConfig(spec=str(model_folder), dtype="float32"),
        corpus=CorpusConfig(source=str(make_tiny_corpus(folder / "text", documents))),
        sites=sites,
        out=str(folder / "harvest"),
        **settings,
    )
    harvest(config)
    return Path(config.out)
