"""What benchmarks.core_metrics computes of others' definitions, by hand."""

import pytest
import torch

from benchmarks.core_metrics import OURS, compared, formulas


def test_formulas_by_hand() -> None:
    # two batches of a sequence of three positions, of which the first of each is not kept
    x = torch.tensor([[[9.0, 9.0], [1.0, 2.0], [3.0, 2.0]], [[9.0, 9.0], [0.0, 4.0], [0.0, 8.0]]])
    x_hat = torch.tensor([[[0.0, 0.0], [1.0, 1.0], [3.0, 2.0]], [[0.0, 0.0], [0.0, 4.0], [0.0, 6]]])
    keep = torch.tensor([[False, True, True]] * 2)
    found = formulas(x, x_hat, keep, 1)
    # errors 1, 0 and 0, 4; deviations from each batch's mean 1, 1 and 4, 4
    assert found["sae_lens"]["mse"] == 1.25
    assert found["sae_bench"]["mse"] == pytest.approx(1.25 / 2)  # two rows a batch
    assert found["sae_lens"]["explained_variance_legacy"] == pytest.approx(1 - (1 + 0 + 0 + 1) / 4)
    # squared lengths of x_hat 2, 13 and 16, 36; products 3, 13 and 16, 48
    bias = (15 / 16 + 52 / 64) / 2
    assert found["sae_bench"]["relative_reconstruction_bias"] == pytest.approx(bias)
    # E||x||^2 = (9 + 40) / 2; means of squared coordinates 5, 4 and 0, 40
    variance = 24.5 - (49 / 4) ** 2
    expected = 1 - 1.25 / variance
    assert found["sae_bench"]["explained_variance"] == pytest.approx(expected)
    assert "explained_variance" not in found["sae_lens"]  # as we define it


def test_a_difference_is_to_the_formula_where_there_is_one() -> None:
    ours = dict.fromkeys((*filter(None, OURS.values()), "ce_zero_all", "kl_all"), 0.25)
    ours |= {"ce_clean": 1.0, "ce": 2.0, "ce_zero": 9.0, "ce_zero_all": 11.0}
    theirs = {
        "versions": {"sae-lens": "6", "sae-bench": "0"},
        **{library: dict.fromkeys(OURS, 0.5) for library in ("sae_lens", "sae_bench")},
    }
    rows = list(compared(theirs, ours, {"sae_lens": {"mse": 0.375}, "sae_bench": {"mse": 0.5}}))
    by_name = {(row["library"], row["metric"]): row for row in rows}
    assert by_name["sae-lens", "explained_variance"]["ours"] == "0.75"
    assert by_name["sae-lens", "explained_variance"]["difference"] == "-0.25"
    mse = by_name["sae-lens", "mse"]
    assert (mse["ours"], mse["by_formula"], mse["difference"]) == ("", "0.375", "0.12")
    ablated = by_name["sae-bench", "ce_loss_score"]
    assert (ablated["ours"], ablated["by_formula"]) == ("0.25", "0.9")
