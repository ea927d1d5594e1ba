"""Figure 13: downstream score against upstream quality.

    python scripts/data/keyword_task.py
    switch-jax sweep --config configs/sweeps/transfer.py:size=mini --workdir runs/transfer

With size=mini and size=gpu, the task is the one that the first command writes. size=paper has
SuperGLUE and closed-book questions: omit that command, and add --config.data.data_dir=DIR, the
folder of C4 and of the tasks as TFDS prepares them.
"""

from switch_jax.config import parse_arg
from switch_jax.sweeps import Sweep, Transfer

from _sizes import find_size, finetuned_run

CLAIM = (
    "SuperGLUE is about linear in upstream quality, where large dense models are better than"
    " Switch of the same; of knowledge (TriviaQA), Switch has more."
)
PAPER = {"superglue": "average", "closed_book_qa": "closed_book.trivia_qa/score"}  # task → metric


def get_sweep(arg: str = "") -> Sweep:
    """Returns the sweep. Arguments: `size` ('mini', 'gpu' or 'paper')."""
    args = parse_arg(arg, size="mini")
    size = find_size(args.size)
    lines = {
        "dense": {"dense": size.dense, "large": size.large},
        "Switch": {
            **{f"experts_{n}": size.switch(n) for n in size.experts},
            "large_switch": size.large_switch,
        },
    }
    upstream = {name: run.but(size.short) for of in lines.values() for name, run in of.items()}
    runs, figures = dict(upstream), {}
    for task, metric in PAPER.items() if args.size == "paper" else [("pairs", "average")]:
        runs |= {f"{task}_{n}": finetuned_run(n, run, size, task) for n, run in upstream.items()}
        figures[task] = Transfer(
            f"Upstream and downstream: {'the keyword task' if task == 'pairs' else task}",
            CLAIM,
            {label: tuple((n, f"{task}_{n}") for n in of) for label, of in lines.items()},
            metric,
        )
    return Sweep("Upstream and downstream (Figure 13)", runs, size.seeds[:1], figures=figures)
