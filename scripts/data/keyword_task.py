"""Writes a fine-tuning task from the standard library: predict a removed Python keyword.

    python scripts/data/keyword_task.py [--output runs/keyword]

3,000 examples for training, and 600 for validation from documents that pretraining on
`python_docs` holds out: `data.mixture='pairs:runs/keyword/{split}.jsonl'`.
"""

import argparse
import json
import keyword
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from switch_jax.data.sources.python_text import is_held_out_path, python_documents

EXAMPLES = {"train": 3000, "validation": 600}
LETTERS = 80  # of context on either side


def gaps(text: str) -> Iterator[dict[str, str]]:
    """Yields every keyword of a text, removed from its context."""
    for found in re.finditer(rf"\b({'|'.join(keyword.kwlist)})\b", text):
        begin, end = found.span()
        before, after = text[max(0, begin - LETTERS) : begin], text[end : end + LETTERS]
        yield {"inputs": f"{before}<extra_id_0>{after}", "targets": f"<extra_id_0> {found[0]}"}


def write_examples(folder: Path) -> float:
    """Examples of either split, where no keyword is more than a tenth.

    Returns the share of the commonest one in validation.
    """
    rng = random.Random(0)
    share = 0.0
    for split, number in EXAMPLES.items():
        pool = [
            gap
            for document in python_documents()
            if is_held_out_path(document.path) == (split == "validation")
            for gap in gaps(document.text)
        ]
        rng.shuffle(pool)
        taken: Counter = Counter()
        lines = []
        for gap in pool:
            if len(lines) < number and taken[gap["targets"]] < number // 10:
                taken[gap["targets"]] += 1
                lines.append(json.dumps(gap) + "\n")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{split}.jsonl").write_text("".join(lines))
        share = max(taken.values()) / len(lines)
    return share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/keyword"))
    share = write_examples(parser.parse_args().output)
    print(f"The commonest keyword is {share:.1%} of the validation examples.")


if __name__ == "__main__":
    main()
