"""A process that consumes batches and notes what they were, to be killed and continued.

    python feeder.py CONFIG FOLDER INDEX COUNT LAST [POSITION]

As feed INDEX of COUNT, it consumes batches to LAST, from the first or from POSITION, which is
named after the batch before. FOLDER/batches-INDEX.jsonl gets a line for each: its number, and a
digest of every row. After every third, FOLDER/NUMBER gets the position, as in training: before
the next batch is drawn.
"""

import hashlib
import json
import sys
import time
from pathlib import Path

from switch_jax.config.load import load_config
from switch_jax.data import open_batches
from switch_jax.data.batch import ProcessRows


def digests(batch):
    """One for each row of a batch."""
    return [
        hashlib.blake2b(b"".join(batch[name][i].tobytes() for name in sorted(batch))).hexdigest()
        for i in range(len(batch["encoder_input_tokens"]))
    ]


def main(spec, folder, index, count, last, position=None):
    batches = open_batches(load_config(spec), "train", ProcessRows(count, (index,), index, count))
    first = 0
    if position is not None:
        batches.restore(position)
        first = int(position.name)
    with open(folder / f"batches-{index}.jsonl", "a") as log:
        for number in range(first + 1, last + 1):
            log.write(json.dumps({"number": number, "rows": digests(next(batches))}) + "\n")
            log.flush()
            if number % 3 == 0:
                partial = folder / f"partial-{index}"
                batches.save(partial)
                (folder / str(number)).mkdir(exist_ok=True)
                for part in partial.glob("*"):
                    part.rename(folder / str(number) / part.name)
            time.sleep(0.02)


if __name__ == "__main__":
    spec, folder, *numbers = sys.argv[1:6]
    main(spec, Path(folder), *map(int, numbers), *map(Path, sys.argv[6:]))
