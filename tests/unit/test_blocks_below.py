"""Passes that skip the blocks below a site: the same bits, with none of these blocks run."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from activations import Model, load_model
from activations.models.blocks_below import BlocksBelow
from sae.training.end_to_end import EndToEnd, EndToEndConfig
from tests.tiny import make_tiny_model

SITE = "blocks.2.hook_resid_post"


def blocks_of(model: Model) -> list[Any]:
    return list(model.hf.get_submodule(model.adapter.get_component_mapping()["blocks"].name))


def own_copy(model: Model) -> Model:
    hf = copy.deepcopy(model.hf)
    return Model(hf, model.tokenizer, spec=model.spec, folder=model.folder)


def runs(block: nn.Module, found: list[nn.Module]) -> None:
    """Note each time that something within a block computes."""
    next(block.children()).register_forward_hook(lambda module, *_: found.append(module))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_the_same_logits_from_the_sites_block_on(tmp_path: Path, architecture: str) -> None:
    model = load_model(str(make_tiny_model(tmp_path / "model", architecture)), dtype="float32")
    assert isinstance(model, Model)
    below = BlocksBelow(model, SITE)
    assert len(below) == 2
    tokens = torch.randint(5, model.d_vocab, (3, 20), generator=torch.Generator().manual_seed(0))
    with below.keeping() as kept:
        whole = model.logits(tokens)
    ran: list[nn.Module] = []
    for block in blocks_of(model):
        runs(block, ran)
    for _ in range(2):  # a block that works in place would spoil what the second pass is given
        with below.skipping(kept[0]):
            assert torch.equal(model.logits(tokens), whole)
    above = next(blocks_of(model)[2].children())
    assert ran == [above, above]
    assert torch.equal(model.logits(tokens), whole)
    assert len(ran) == 5


def test_a_forward_of_its_own_is_put_back(tiny_model: Model) -> None:
    model = own_copy(tiny_model)
    first = blocks_of(model)[0]
    first.forward = wrapped = copy.copy(first.forward)
    below = BlocksBelow(model, SITE)
    with pytest.raises(RuntimeError, match="stopped"), below.skipping(torch.zeros(1)):
        raise RuntimeError("stopped")
    assert [vars(block).get("forward") for block in blocks_of(model)] == [wrapped, None, None]


def test_there_are_none_outside_of_the_blocks_and_in_the_first(tiny_model: Model) -> None:
    for site in ("hook_embed", "blocks.0.hook_resid_post", "module:model.layers.2:output"):
        below = BlocksBelow(tiny_model, site)
        assert len(below) == 0
        with below.keeping() as kept:
            tiny_model.logits(torch.tensor([[5, 6]]))
        assert kept == []


def test_a_model_whose_blocks_hand_on_more_runs_as_a_whole(tiny_model: Model) -> None:
    """The last block takes what the first left beside its output, or adds it."""
    for strict in (True, False):
        model = own_copy(tiny_model)
        first, _, last = blocks_of(model)
        left: dict[str, Tensor] = {}
        leave, take = first.forward, last.forward

        def leaving(x: Tensor, *args: Any, f: Any = leave, to: Any = left, **more: Any) -> Any:
            to["x"] = x
            return f(x, *args, **more)

        def taking(
            x: Tensor, *args: Any, f: Any = take, of: Any = left, must: bool = strict, **more: Any
        ) -> Any:
            other = of.pop("x") if must else of.pop("x", torch.zeros(()))
            return f(x + other, *args, **more)

        first.forward, last.forward = leaving, taking
        assert len(BlocksBelow(model, SITE)) == 0
        own = EndToEnd(model, SITE, EndToEndConfig())
        tokens = torch.randint(5, model.d_vocab, (2, 9))
        x, sequences = own.capture(tokens, model.keep_mask(tokens))
        assert own.loss(sequences, x).loss.item() == 0
        assert own.loss(sequences, 0 * x).loss.item() > 0


@pytest.mark.parametrize("at_once", [2, 100])
def test_the_end_to_end_loss_is_the_same_bits(tiny_model: Model, at_once: int) -> None:
    own = EndToEnd(tiny_model, SITE, EndToEndConfig(sequences_at_once=at_once))
    tokens = torch.randint(5, tiny_model.d_vocab, (5, 9))
    x, sequences = own.capture(tokens, tiny_model.keep_mask(tokens))
    assert len(sequences.below) == (3 if at_once == 2 else 1)
    ran: list[nn.Module] = []
    found = []
    handles = [
        next(block.children()).register_forward_hook(lambda module, *_: ran.append(module))
        for block in blocks_of(tiny_model)[:2]
    ]
    for each in (sequences, replace(sequences, below=[])):
        x_hat = (0.5 * x).requires_grad_()
        loss = own.loss(each, x_hat).loss
        found.append((loss, *torch.autograd.grad(loss, x_hat)))
        if each is sequences:
            assert ran == []
    for handle in handles:
        handle.remove()
    assert ran
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
