"""Figures 7 and 8: quality and speed-up by language.

    python scripts/data/package_text.py
    switch-jax sweep --config configs/sweeps/languages.py:size=mini --workdir runs/languages

With size=mini and size=gpu, the first command packs the data: programming languages and English.
size=paper has the languages of mC4: omit that command, and add --config.data.data_dir=DIR, the
folder of mC4.
"""

from switch_jax.config import parse_arg
from switch_jax.sweeps import Curves, Sources, Sweep, SweepRun, Table

from _sizes import find_size

CLAIM = "All 101 languages gain; the mean speed-up is 5, and for 91 % of them it is at least 4."
# Text of `scripts/data/package_text.py`, sampled as in mT5; its vocabulary is for GPUs.
TEXT = {
    "data.mixture": "python,c,stubs,cython,english",
    "data.data_dir": "runs/packages",
    "data.rate_exponent": 0.3,
    "model.vocab_size": 8192,
}


def get_sweep(arg: str = "") -> Sweep:
    """Returns the sweep. Arguments: `size` ('mini', 'gpu' or 'paper')."""
    args = parse_arg(arg, size="mini")
    size = find_size(args.size)
    if args.size == "paper":
        runs = {
            "mT5": SweepRun("mt5_base"),
            "mSwitch": SweepRun("mswitch_base"),
        }
    else:
        runs = {"mT5": size.dense.but(TEXT), "mSwitch": size.switch().but(TEXT)}
    named = {"mT5-Base": "mT5", "mSwitch-Base": "mSwitch"}
    return Sweep(
        title="Language by language (Figures 7 and 8)",
        runs=runs,
        seeds=size.seeds,
        tables={"languages": Table("The whole mixture", CLAIM, named)},
        figures={
            "sources": Sources("Language by language", CLAIM, "mT5", "mSwitch"),
            "steps": Curves("The whole mixture, by step", CLAIM, named),
        },
    )
