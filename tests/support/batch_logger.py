"""A process that reads batches and logs their digests; tests kill it and start it again.

    python batch_logger.py CONFIG FOLDER INDEX COUNT LAST [POSITION]

The process is INDEX of COUNT. It reads batches up to number LAST, from the first or from the saved
POSITION, a folder named by the number of the batch before. FOLDER/batches-INDEX.jsonl gets a line
for each batch: its number and a digest of every row. After every third batch, the position is saved
to FOLDER/NUMBER, before the next batch is read, as in training.
"""

import hashlib
import json
import sys
import time
from pathlib import Path

from switch_jax.config.load import load_config
from switch_jax.data import open_batches
from switch_jax.data.batch import ProcessRows


def row_digests(batch):
    """Returns a digest of each row of a batch."""
    return [
        hashlib.blake2b(b"".join(batch[name][i].tobytes() for name in sorted(batch))).hexdigest()
        for i in range(len(batch["encoder_input_tokens"]))
    ]


def main(spec, folder, index, count, last, position=None):
    batches = open_batches(load_config(spec), "train", ProcessRows(count, (index,), index, count))
    last_read = 0
    if position is not None:
        batches.restore(position)
        last_read = int(position.name)
    with open(folder / f"batches-{index}.jsonl", "a") as log:
        for number in range(last_read + 1, last + 1):
            log.write(json.dumps({"number": number, "rows": row_digests(next(batches))}) + "\n")
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
