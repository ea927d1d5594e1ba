"""The command line: `switch-jax VERB`, its arguments, and how it ends."""

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from switch_jax.cli.verbs import (
    bench,
    compile,
    convert_from_hf,
    convert_from_t5x,
    convert_to_hf,
    convert_upcycle,
    data_pack,
    data_peek,
    data_vocab,
    eval,
    experts,
    export,
    generate,
    inspect,
    plot,
    sweep,
    train,
)
from switch_jax.errors import UserError

_SWEEP_HELP = (
    "configs/sweeps/NAME.py or configs/sweeps/NAME.py:size=mini; change keys of all runs with"
    " --config.KEY=VALUE"
)
_CONFIG_HELP = "configs/NAME.py or configs/NAME.py:key=value,…; change keys with --config.KEY=VALUE"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb; 0 is success, 2 a mistake of the user's, told in one sentence on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(arguments)
    except BaseException:
        if not _among_others():
            raise
        traceback.print_exc()
        code = 1
    if code in (1, 2) and _among_others():
        from switch_jax.distributed import exit_after_failure

        exit_after_failure(code)
    return code


def _among_others() -> bool:
    """Whether this is one of several processes that JAX has connected."""
    jax = sys.modules.get("jax")  # without it, a mistake in a flag is told at once
    return jax is not None and jax.distributed.is_initialized()


def _run(arguments: list[str]) -> int:
    verbose = "--verbose" in arguments
    try:
        overrides, rest = _take_overrides(arguments)
        args = _parser().parse_args(rest)
        args.overrides = overrides
        if overrides and not hasattr(args, "config"):
            raise UserError(
                f"`{args.verb}` takes no --config; leave --config.{next(iter(overrides))} out."
            )
        return args.run(args) or 0
    except UserError as error:
        if verbose:
            raise
        print(f"switch-jax: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if verbose or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = error.filename or "the output"
        print(f"switch-jax: No space is left for {where}; free some.", file=sys.stderr)
        return 2


def _take_overrides(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Separates `--config.KEY=VALUE` and `--config.KEY VALUE` from the other arguments."""
    overrides, rest = {}, []
    waiting = iter(arguments)
    for argument in waiting:
        if not argument.startswith("--config."):
            rest.append(argument)
            continue
        key, equals, value = argument.removeprefix("--config.").partition("=")
        if not equals:
            value = next(waiting, "--")
            if value.startswith("--"):
                raise UserError(f"--config.{key} needs a value: write --config.{key}=VALUE.")
        overrides[key] = value
    return overrides, rest


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="switch-jax",
        description="Pretrain, evaluate, decode from and look into Switch Transformers.",
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(
        name: str, run: Callable, text: str, parent: Any = subparsers
    ) -> argparse.ArgumentParser:
        sub = parent.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run)
        sub.add_argument("--verbose", action="store_true", help="show tracebacks of errors")
        return sub

    def config(sub: argparse._ActionsContainer, *, required: bool = True) -> None:
        sub.add_argument("--config", required=required, metavar="FILE", help=_CONFIG_HELP)

    def workdir(sub: argparse.ArgumentParser, text: str) -> None:
        sub.add_argument("--workdir", required=True, metavar="DIR", help=text)

    def processes(sub: argparse.ArgumentParser) -> None:
        group = sub.add_argument_group("several processes, where they do not find each other")
        group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
        group.add_argument("--num_processes", type=int, metavar="N")
        group.add_argument("--process_id", type=int, metavar="I", help="0 … N-1")

    def as_json(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = verb("train", train, "train a model, or continue from the newest good checkpoint")
    config(sub)
    workdir(sub, "folder of the run; made if it does not exist")
    processes(sub)

    sub = verb("eval", eval, "evaluate a checkpoint on the validation set of its config")
    config(sub, required=False)
    workdir(sub, "a WORKDIR, or one of its checkpoints")
    processes(sub)
    as_json(sub)

    sub = verb("experts", experts, "show what each expert of a checkpoint specialises in")
    config(sub, required=False)
    workdir(sub, "a WORKDIR, or one of its checkpoints")
    sub.add_argument("--input", metavar="FILE", help="a text (default: validation batches)")
    sub.add_argument("--output", metavar="DIR", help="where to (default: DIR/experts)")
    processes(sub)
    as_json(sub)

    sub = verb("generate", generate, "fill a text's blanks (___), or answer it")
    workdir(sub, "a WORKDIR, or one of its checkpoints")
    text = sub.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", help="a text, with blanks (___ or <extra_id_0> …) or without")
    text.add_argument("--input", metavar="FILE", help="a file with one such text a line")
    sub.add_argument(
        "--max_length", type=_positive, default=128, metavar="N", help="tokens at the most (128)"
    )
    sub.add_argument(
        "--beam_size",
        type=_positive,
        default=1,
        metavar="N",
        help="follow the N best sequences (1: only the best next token)",
    )
    drawn = sub.add_argument_group("drawing tokens instead of taking the best")
    drawn.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0: do not; 1: as the model says",
    )
    drawn.add_argument(
        "--top_k", type=int, default=0, metavar="K", help="only from the K best (0: from all)"
    )
    drawn.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        metavar="P",
        help="only from the fewest that are together as probable as P (1: from all)",
    )
    drawn.add_argument(
        "--seed", type=int, default=0, metavar="S", help="another S draws others (0)"
    )

    sub = verb("export", export, "write a checkpoint as programs for serving, by jax.export")
    workdir(sub, "a WORKDIR, or one of its checkpoints")
    sub.add_argument("--output", required=True, metavar="DIR", help="the folder to write")
    sub.add_argument(
        "--inputs_length", type=_positive, metavar="N", help="tokens of an input (as in training)"
    )
    sub.add_argument(
        "--max_length", type=_positive, metavar="N", help="tokens to generate (as in training)"
    )

    sub = verb("inspect", inspect, "parameters, FLOPs and memory of a config; needs no data")
    of = sub.add_mutually_exclusive_group(required=True)
    config(of, required=False)
    of.add_argument("--workdir", metavar="DIR", help="the WORKDIR of a run, for its config")
    sub.add_argument(
        "--topology", metavar="NAME", help="suggest meshes for v5p:8x16x16, h100:64 or the like"
    )
    sub.add_argument("--slices", type=_positive, default=1, metavar="N", help="TPU slices (1)")
    as_json(sub)

    sub = verb("compile", compile, "compile the train step for a machine that is not here")
    config(sub)
    sub.add_argument(
        "--topology",
        required=True,
        metavar="NAME",
        help="v5p:8x16x16 (TPU and shape of a slice), cpu:8 (pretended devices) or gpu (attached)",
    )
    sub.add_argument("--slices", type=_positive, default=1, metavar="N", help="TPU slices (1)")
    sub.add_argument("--output", metavar="FILE", help="picture of which device holds what, .png")
    as_json(sub)

    sub = verb("bench", bench, "time a config against its FLOP-matched dense twin")
    config(sub)
    sub.add_argument("--repeats", type=_positive, default=10, help="timed runs of each (10)")
    processes(sub)
    as_json(sub)

    sub = verb("plot", plot, "draw the metrics of one or more runs")
    sub.add_argument(
        "--workdir",
        required=True,
        nargs="+",
        metavar="DIR",
        help="runs to compare; of two, the first is the baseline of speed-ups by source",
    )
    sub.add_argument("--output", metavar="DIR", help="where to (default: DIR/figures of the first)")

    sub = verb("sweep", sweep, "train the runs of a sweep, and draw what they show")
    sub.add_argument("--config", required=True, metavar="FILE", help=_SWEEP_HELP)
    workdir(sub, "folder of the sweep; several processes may share it")
    sub.add_argument(
        "--commands",
        action="store_true",
        help="train nothing, and print what trains the runs that can begin",
    )

    data = subparsers.add_parser("data", help="vocabularies, packed text, a look at examples")
    data_verbs = data.add_subparsers(dest="data_verb", metavar="VERB", required=True)
    sub = verb("vocab", data_vocab, "train a vocabulary on a mixture", data_verbs)
    config(sub)
    sub.add_argument("--output", required=True, metavar="FILE", help="the model file to write")
    sub.add_argument(
        "--megabytes", type=float, default=20.0, metavar="N", help="text to train on (20)"
    )
    sub.add_argument(
        "--coverage",
        type=float,
        default=0.9995,
        metavar="SHARE",
        help="characters that are pieces, the rest being bytes (0.9995; mT5: 0.99999)",
    )
    sub = verb("pack", data_pack, "tokenise a mixture, once for all", data_verbs)
    config(sub)
    sub.add_argument("--output", required=True, metavar="DIR", help="the folder to write")
    sub.add_argument(
        "--workers",
        type=_positive,
        default=os.cpu_count(),
        metavar="N",
        help="processes (all cores)",
    )
    sub = verb("peek", data_peek, "print decoded training examples", data_verbs)
    config(sub)
    sub.add_argument("--count", type=_positive, default=3, help="examples of each source (3)")
    sub.add_argument("--split", choices=("train", "validation"), default="train")

    convert = subparsers.add_parser("convert", help="checkpoints of other programs, in and out")
    convert_verbs = convert.add_subparsers(dest="convert_verb", metavar="VERB", required=True)

    def conversion(name: str, run: Callable, text: str, source: str) -> argparse.ArgumentParser:
        sub = verb(name, run, text, convert_verbs)
        sub.add_argument("source", metavar=source, help="what is read")
        sub.add_argument("output", metavar="OUT", help="the folder to write; must not exist")
        return sub

    conversion(
        "from-hf",
        convert_from_hf,
        "a WORKDIR from a Hugging Face folder (T5, mT5, Switch Transformers)",
        "DIR",
    )
    conversion("to-hf", convert_to_hf, "a Hugging Face folder from a checkpoint", "WORKDIR")
    conversion(
        "from-t5x",
        convert_from_t5x,
        "a WORKDIR from a T5X checkpoint (T5, mT5, Switch Transformers)",
        "DIR",
    )
    sub = conversion(
        "upcycle",
        convert_upcycle,
        "a sparse model from a dense one; say how with --config.moe.num_experts=8 or the like",
        "DIR",
    )
    config(sub, required=False)
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number
