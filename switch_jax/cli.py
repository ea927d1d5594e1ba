"""The command line: `switch-jax VERB`; heavy modules are imported by the verbs that need them."""

import argparse
import errno
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switch_jax.errors import UserError

if TYPE_CHECKING:
    from switch_jax.schema import Config
    from switch_jax.workdir import Workdir

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
        from switch_jax import processes

        processes.leave(code)
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
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, run: Callable, text: str, parent: Any = verbs) -> argparse.ArgumentParser:
        sub = parent.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run)
        sub.add_argument("--verbose", action="store_true", help="show tracebacks of errors")
        return sub

    def config(sub: argparse.ArgumentParser, *, required: bool = True) -> None:
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

    sub = verb("train", _train, "train a model, or continue from the newest good checkpoint")
    config(sub)
    workdir(sub, "folder of the run; made if it does not exist")
    processes(sub)

    sub = verb("eval", _eval, "evaluate a checkpoint on the validation set of its config")
    config(sub, required=False)
    workdir(sub, "a WORKDIR, or one of its checkpoints")
    processes(sub)
    as_json(sub)

    sub = verb("experts", _experts, "show what each expert of a checkpoint specialises in")
    config(sub, required=False)
    workdir(sub, "a WORKDIR, or one of its checkpoints")
    sub.add_argument("--input", metavar="FILE", help="a text (default: validation batches)")
    sub.add_argument("--output", metavar="DIR", help="where to (default: DIR/experts)")
    processes(sub)
    as_json(sub)

    sub = verb("generate", _generate, "fill the blanks (___ or <extra_id_0> …) of a text")
    workdir(sub, "a WORKDIR, or one of its checkpoints")
    text = sub.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", help="a text with blanks")
    text.add_argument("--input", metavar="FILE", help="a file with one such text a line")
    sub.add_argument("--max_length", type=_positive, default=128, help="tokens at the most (128)")

    sub = verb("inspect", _inspect, "parameters, FLOPs and memory of a config; needs no data")
    config(sub)
    sub.add_argument(
        "--topology", metavar="NAME", help="suggest meshes for v5p:8x16x16, h100:64 or the like"
    )
    sub.add_argument("--slices", type=_positive, default=1, metavar="N", help="TPU slices (1)")
    as_json(sub)

    sub = verb("compile", _compile, "compile the train step for a machine that is not here")
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

    sub = verb("bench", _bench, "time a config against its FLOP-matched dense twin")
    config(sub)
    sub.add_argument("--repeats", type=_positive, default=10, help="timed runs of each (10)")
    processes(sub)
    as_json(sub)

    sub = verb("plot", _plot, "draw the metrics of one or more runs")
    sub.add_argument("--workdir", required=True, nargs="+", metavar="DIR", help="runs to compare")
    sub.add_argument("--output", metavar="DIR", help="where to (default: DIR/figures of the first)")

    data = verbs.add_parser("data", help="vocabularies, and a look at training examples")
    data_verbs = data.add_subparsers(dest="data_verb", metavar="VERB", required=True)
    sub = verb("vocab", _data_vocab, "train a SentencePiece vocabulary on a mixture", data_verbs)
    config(sub)
    sub.add_argument("--output", required=True, metavar="FILE", help="the model file to write")
    sub = verb("peek", _data_peek, "print decoded training examples", data_verbs)
    config(sub)
    sub.add_argument("--count", type=_positive, default=3, help="how many examples (3)")
    sub.add_argument("--split", choices=("train", "validation"), default="train")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def _load_config(args: argparse.Namespace) -> "Config":
    from switch_jax import config

    return config.load(args.config, args.overrides)


def _start(args: argparse.Namespace, config: "Config | None" = None) -> None:
    """Starts JAX, and finds the other processes where there are several."""
    from switch_jax import config as config_lib
    from switch_jax import launch

    flags = None
    if hasattr(args, "process_id"):
        flags = launch.from_flags(args.coordinator, args.num_processes, args.process_id)
    facts = {"the verb": args.verb}
    if hasattr(args, "workdir"):
        facts["--workdir"] = os.path.abspath(args.workdir)
    facts |= args.overrides if config is None else config_lib.flat(config)
    from switch_jax import backend

    backend.start(flags, facts)


def _show(text: str) -> None:
    """Prints a result; of several processes, the first does."""
    import jax

    if jax.process_index() == 0:
        print(text)


def _train(args: argparse.Namespace) -> int:
    config = _load_config(args)
    _start(args, config)
    from switch_jax.train import train
    from switch_jax.workdir import Workdir

    stopped_by = train(config, Workdir(args.workdir))
    return 0 if stopped_by is None else 128 + stopped_by


def _find_checkpoint(args: argparse.Namespace) -> "tuple[Workdir, Path, Config]":
    """WORKDIR and checkpoint of `--workdir`, and the config they are used with."""
    from switch_jax import checkpoint, config

    _start(args)
    workdir, folder = checkpoint.find_together(args.workdir)
    made_with = config.override(workdir.config(), args.overrides)
    return workdir, folder, _load_config(args) if args.config else made_with


def _eval(args: argparse.Namespace) -> None:
    from switch_jax.evaluate import evaluate_checkpoint

    metrics = evaluate_checkpoint(*_find_checkpoint(args))
    shown = ("cross_entropy", "neg_log_perplexity", "accuracy", "unigram_entropy")
    lines = "\n".join(f"{name:20} {metrics[name]:.4f}" for name in shown)
    _show(json.dumps(metrics) if args.json else lines)


def _experts(args: argparse.Namespace) -> None:
    if args.output and Path(args.output).is_file():
        raise UserError(f"{args.output} is a file; name a folder as --output.")
    import jax

    from switch_jax import experts, experts_report, plots

    plots.matplotlib()  # missing: say so before anything is computed
    workdir, folder, config = _find_checkpoint(args)
    text = None if args.input is None else Path(args.input)
    analysis = experts.analyse(workdir, folder, config, text)
    if jax.process_index():
        return
    output = Path(args.output) if args.output else workdir.experts
    written = experts_report.write(analysis, output)
    if args.json:
        print(json.dumps(analysis))
    else:
        print("\n".join([*map(str, written), "", experts_report.render(analysis)]))


def _generate(args: argparse.Namespace) -> None:
    if args.input and not Path(args.input).is_file():
        raise UserError(f"Input file {args.input!r} does not exist.")
    texts = Path(args.input).read_text(errors="replace").splitlines() if args.input else [args.text]
    from switch_jax import checkpoint
    from switch_jax.data.vocabulary import Vocabulary
    from switch_jax.decode import fill_blanks

    _start(args)
    workdir, folder = checkpoint.find_together(args.workdir)
    vocabulary = Vocabulary(workdir.vocabulary)
    model = checkpoint.load(folder)
    for text in texts:
        _show(fill_blanks(model, vocabulary, text, max_length=args.max_length))


def _inspect(args: argparse.Namespace) -> None:
    from switch_jax import accounting, chips, meshes

    config = _load_config(args)
    summary, suggestions = accounting.summary(config), []
    if args.topology:
        chip, devices = chips.of_topology(args.topology)
        suggestions = meshes.suggest(config, chip, devices * args.slices, args.slices)
        summary["meshes"] = [meshes.as_json(suggestion) for suggestion in suggestions]
    if args.json:
        print(json.dumps(summary))
    else:
        print(accounting.render(summary))
        if suggestions:
            print("", meshes.render(suggestions), sep="\n")


def _compile(args: argparse.Namespace) -> None:
    config = _load_config(args)
    from switch_jax import aot, plots

    if args.output:
        plots.matplotlib()  # missing: say so before minutes of compilation
    target = aot.Target(args.topology, args.slices)
    result = aot.compile_step(config, target)
    if args.output:
        plots.placement(result, Path(args.output))
    print(json.dumps(result) if args.json else aot.render(result), flush=True)
    if not result["fits"]:
        raise UserError(aot.remedy(config, target, result))


def _bench(args: argparse.Namespace) -> None:
    config = _load_config(args)
    _start(args, config)
    from switch_jax import bench

    result = bench.run(config, args.repeats)
    _show(json.dumps(result) if args.json else bench.render(result))


def _plot(args: argparse.Namespace) -> None:
    from switch_jax import plots
    from switch_jax.workdir import Workdir

    workdirs = [Workdir(path) for path in args.workdir]
    folder = Path(args.output) if args.output else workdirs[0].figures
    for path in plots.draw(workdirs, folder):
        print(path)


def _data_vocab(args: argparse.Namespace) -> None:
    from switch_jax.data import corpus, vocabulary

    config, output = _load_config(args), Path(args.output)
    if output.exists():
        raise UserError(f"{output} exists already; choose another --output.")
    texts = (document.text for document in corpus.documents(config.data.mixture, "train"))
    vocabulary.train(texts, output, config.model.vocab_size)
    print(f"{output}: {vocabulary.Vocabulary(output).size:,} ids, 100 sentinels included")


def _data_peek(args: argparse.Namespace) -> None:
    from switch_jax.data.peek import peek

    print(peek(_load_config(args), args.count, args.split))
