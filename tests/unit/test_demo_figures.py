"""What is recorded of a demo, from what it prints."""

from benchmarks import demo_figures

PRINTED: list[str] = [
    *"""\
about 5 minutes (1,030 tokens/s, 61 GFLOP/s here). Ctrl-C ends it at any time
harvest: 149,888 tokens
harvest:   7%  10,240/149,888 tokens, 1,021/s, 2m17s left
harvest: done, 149,888 tokens in 1m05s
data/tiny: 147,335 rows, 0.17 GB
measuring the model's loss: 16 sequences
measuring the model's loss: 100%  16/16 sequences, 1/s, 0s left
measuring the model's loss: done, 16 sequences in 9s
steered (add {3: 8.0}): He said: 90% of them
demo: done in 2m58s
""".splitlines()
]


def test_times() -> None:
    assert demo_figures.times(PRINTED) == {
        "foreseen": (300.0, "s"),
        "measured first: the model": (1030.0, "tokens/s"),
        "measured first: a product": (61.0, "GFLOP/s"),
        "harvest": (65.0, "s"),
        "measuring the model's loss": (9.0, "s"),
        "demo": (178.0, "s"),
    }


def test_lines_of_progress_are_left_out() -> None:
    left = demo_figures.without_progress(PRINTED)
    assert [line for line in PRINTED if line not in left] == [
        "harvest: 149,888 tokens",
        "harvest:   7%  10,240/149,888 tokens, 1,021/s, 2m17s left",
        "measuring the model's loss: 16 sequences",
        "measuring the model's loss: 100%  16/16 sequences, 1/s, 0s left",
    ]
