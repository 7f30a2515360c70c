"""What docs/reports/performance.md says of harvesting and reading, from the rows of the two."""

from collections.abc import Iterator, Mapping, Sequence

from benchmarks import harvest, loader

Row = Mapping[str, str]
_THIRD = ("threads", "processor", "torch")
PRECISIONS = {"bfloat16": "bf16", "float32": "fp32"}


def section(harvested: Sequence[Row], read: Sequence[Row], trained: float | None) -> Iterator[str]:
    """Paragraphs and tables. Args: trained is the most tokens a second that a trainer takes."""
    if harvested:
        found = _latest(harvested, ("library", "setting", "sites", "dtype"))
        yield "## Harvesting"
        yield (
            f"{_machine(harvested[-1])} `python -m benchmarks.harvest`: {found[0]['model']}, the "
            "residual stream after one block (three sites: after three, the last the same), beside "
            "a bare Hugging Face forward that stops there, and SAELens' cached-activations runner, "
            "on the same tokens in the same batches. Computed is a harvest without its disk, "
            "written all of it. Memory is resident, above that with the model loaded and run."
        )
        yield _targets(harvest_targets(found))
        yield "\n".join(_harvest_table(found))
    if read:
        found = _latest(read, ("library", "setting", "storage", "batches"))
        yield "## Reading"
        yield (
            f"{_machine(read[-1])} `python -m benchmarks.loader`: {int(found[0]['rows']):,} rows "
            f"of width {found[0]['d_in']} from a warm cache, in shuffled batches of "
            f"{found[0]['batch']}. SAELens reads the data set that its own runner writes."
        )
        yield _targets(loader_targets(found, trained))
        yield "\n".join(_loader_table(found))


def harvest_targets(found: Sequence[Row]) -> Iterator[tuple[str, str, str, bool]]:
    """What, target, measured, and whether it holds; only of what was measured."""
    for dtype, short in PRECISIONS.items():
        rates = {
            (row["library"], row["setting"], row["sites"]): float(row["tokens_per_s"])
            for row in found
            if row["dtype"] == dtype and row["setting"] != harvest.MEMORY
        }
        forward = rates.get((harvest.BARE, harvest.FORWARD, "1"))
        one, three = (rates.get((harvest.OURS, harvest.COMPUTED, n)) for n in ("1", "3"))
        written = rates.get((harvest.OURS, harvest.WRITTEN, "1"))
        peer = rates.get((harvest.SAELENS, harvest.RUNNER, "1"))
        for sites, rate, least in (("one site", one, 0.95), ("three sites", three, 0.9)):
            if forward and rate:
                share = rate / forward
                what = f"harvest of {sites}, {short}, over the bare forward"
                yield what, f"at least {least}", f"{share:.3f}", share >= least
        if forward and one and written:
            added = forward / written - forward / one
            what = f"what writing adds to the forward, {short}"
            yield what, "at most 8 %", f"{added:.1%}", added <= 0.08
        if written and peer:
            ratio = written / peer
            # what a harvest would reach that did no more than torch's own forward pass
            bound = f" (the bare forward: {forward / peer:.2f}x)" if forward else ""
            what = f"harvest, written, {short}, over SAELens"
            yield what, "1.5x", f"{ratio:.2f}x{bound}", ratio >= 1.5
    for row in found:
        if row["setting"] == harvest.MEMORY:
            first, peak = int(row["first_window_mib"]), int(row["peak_mib"])
            what = f"peak memory above the model's, {PRECISIONS.get(row['dtype'], row['dtype'])}"
            yield what, "below 2048 MiB", f"{peak} MiB", peak < 2048
            what = f"the same after {row['windows']} windows, over that after one"
            # both a window that is computed and one that is written are there from the second on
            yield what, "flat", f"{peak / max(first, 1):.2f}", peak - first < 512


def loader_targets(
    found: Sequence[Row], trained: float | None
) -> Iterator[tuple[str, str, str, bool]]:
    """The same of the loader, in its default order."""
    rates = {
        (row["library"], row["setting"], row["storage"], row["batches"]): float(row["tokens_per_s"])
        for row in found
    }
    for dtype, short in PRECISIONS.items():
        rate = rates.get((loader.OURS, "spread", "bfloat16", dtype))
        if rate is None:
            continue
        what = f"bf16 rows in batches of {short}"
        yield what, "1.5 M tokens/s", f"{rate / 1e6:.2f} M", rate >= 1.5e6
        if trained:
            ratio = rate / trained
            yield f"{what}, over the fastest trainer", "25x", f"{ratio:.0f}x", ratio >= 25
        for library, least in ((loader.SAELENS, 10), (loader.SHARDS, 1)):
            others = [other for who, other in rates.items() if who[0] == library]
            if others:
                ratio = rate / max(others)
                yield f"{what}, over {library}", f"{least}x", f"{ratio:.2f}x", ratio >= least


def _targets(found: Iterator[tuple[str, str, str, bool]]) -> str:
    lines = ["| what | target | measured | holds |", "|---|---|---|---|"]
    for what, target, measured, holds in found:
        lines.append(f"| {what} | {target} | {measured} | {'yes' if holds else '**no**'} |")
    return "\n".join(lines)


def _harvest_table(found: Sequence[Row]) -> Iterator[str]:
    yield (
        "| library | what | sites | precision | tokens/s | least | µs of processor a token | "
        "over the forward | rounds |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in found:
        if row["setting"] != harvest.MEMORY:
            yield (
                f"| {row['library']} {row['version']} | {row['setting']} | {row['sites']} | "
                f"{row['dtype']} | {int(row['tokens_per_s']):,} | "
                f"{int(row['least_tokens_per_s']):,} | {row['cpu_us_per_token']} | "
                f"{row['ratio_to_forward']} | {row['rounds']} |"
            )


def _loader_table(found: Sequence[Row]) -> Iterator[str]:
    yield "| library | order | rows stored as | batches | tokens/s | least | rounds |"
    yield "|---|---|---|---|---|---|---|"
    for row in found:
        yield (
            f"| {row['library']} {row['version']} | {row['setting']} | {row['storage']} | "
            f"{row['batches']} | {int(row['tokens_per_s']):,} | "
            f"{int(row['least_tokens_per_s']):,} | {row['rounds']} |"
        )


def _latest(found: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """The last row of each, of those measured where the last one was."""
    here = [row for row in found if all(row[name] == found[-1][name] for name in _THIRD)]
    return list({tuple(row[name] for name in names): row for row in here}.values())


def _machine(row: Row) -> str:
    return (
        f"Measured on {row['date']}: {row['processor']}, {row['threads']} threads, torch "
        f"{row['torch']}, saescope at {row['commit'][:12]}."
    )
