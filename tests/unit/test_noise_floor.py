"""`python -m benchmarks.noise_floor`: its rows and the page's table, without training anything."""

from benchmarks.noise_floor import COLUMNS, page_lines, rows
from saescope.metrics import metric


def test_rows_and_table() -> None:
    floor = {
        "mean": 0.2,
        "seed_sd": 0.001,
        "measurement_sd": None,
        "paired_sd": 0.0005,
        "smallest_difference": 0.004,
        "values": [0.199, 0.2, 0.201],
    }
    found = {
        "protocol": {"rows": 7426, "sequences": 16},
        "protocol_hash": "0123",
        "runs": [{"run": f"r/{seed}", "seed": seed, "data_seed": seed} for seed in (3, 4, 5)],
        "floors": {"fvu": floor, "norm_ratio": {**floor, "mean": 0.0}},
    }
    known = {name: metric(name) for name in found["floors"]}
    fvu, ratio = rows("topk-quick", found, known)
    assert set(fvu) <= set(COLUMNS)
    assert (fvu["seeds"], fvu["values"], fvu["sample_sd"]) == ("3 4 5", "0.199 0.2 0.201", "")
    assert (fvu["better"], fvu["rows"], fvu["sequences"]) == ("lower", 7426, 16)
    newer = {**fvu, "told_from": "0.002"}
    shown = page_lines([fvu, ratio, newer])
    assert shown[2:] == [
        "| `fvu` | 0.2 | 0.001 | - | 0.0005 | 0.002 | 1.0% |",
        "| `norm_ratio` | 0 | 0.001 | - | 0.0005 | 0.004 | - |",
    ]
