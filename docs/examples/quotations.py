"""Quotations of a text file, one a line and its author behind a dash, as a corpus.

python quotations.py quotations.txt quotations.jsonl
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path


def records(text: str) -> Iterator[dict[str, str]]:
    """A record for each document: its text, and a title that the explorer shows."""
    for line in text.splitlines():
        quotation, dash, author = line.rpartition(" - ")
        if dash:
            yield {"text": quotation, "title": author}


def main(source: str, target: str) -> None:
    """Write the records as lines of JSON."""
    with Path(target).open("w", encoding="utf-8") as file:
        for record in records(Path(source).read_text(encoding="utf-8")):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
