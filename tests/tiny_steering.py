"""A small random SAE to steer a tiny model with."""

import torch

from sae.architectures.topk import TopKConfig, TopKSAE


def made_sae(site: str) -> TopKSAE:
    """24 features, 3 active, of rows of 32, at a site."""
    found = TopKSAE(TopKConfig(d_sae=24, k=3), 32)
    torch.manual_seed(1)
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    found.metadata = {"site": site}
    return found.eval()
