"""`switch-jax data`: vocabularies, token stores, and a look at training examples."""

import argparse
import os
import shlex

from switch_jax.cli.arguments import (
    add_config,
    add_verbose,
    number,
    output_file,
    output_folder,
    whole_number,
)
from switch_jax.cli.startup import load_config_argument
from switch_jax.errors import UserError
from switch_jax.files import as_path, is_bucket, staged_file

HELP = "train vocabularies, pack text, print training examples"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verbs `data vocab`, `data pack` and `data peek`."""
    verbs = parser.add_subparsers(dest="data_verb", metavar="VERB", required=True)

    def verb(name: str, run, text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        add_config(sub)
        add_verbose(sub)
        return sub

    vocab = verb("vocab", run_vocab, "train a SentencePiece vocabulary on a mixture")
    vocab.add_argument(
        "--output", required=True, type=output_file, metavar="FILE", help="model file to write"
    )
    vocab.add_argument(
        "--megabytes", type=number, default=20.0, metavar="N", help="text to train on (20)"
    )
    vocab.add_argument(
        "--coverage",
        type=number,
        default=0.9995,
        metavar="SHARE",
        help="share of characters that are pieces; the rest are bytes (0.9995; mT5: 0.99999)",
    )
    pack = verb("pack", run_pack, "tokenise a mixture into a token store")
    pack.add_argument(
        "--output", required=True, type=output_folder, metavar="DIR", help="folder to write"
    )
    pack.add_argument(
        "--workers",
        type=whole_number(1),
        metavar="N",
        help="number of processes (all cores)",
    )
    pack.add_argument(
        "--runner",
        metavar="NAME",
        help="runner of Apache Beam, which packs on many machines: DataflowRunner and others",
    )
    pack.add_argument(
        "--pipeline_options",
        type=shlex.split,
        metavar="FLAGS",
        help="flags of Beam for --runner: '--project=P --region=R'",
    )
    peek = verb("peek", run_peek, "print decoded training examples")
    peek.add_argument(
        "--count", type=whole_number(1), default=3, metavar="N", help="examples of each source (3)"
    )
    peek.add_argument(
        "--split", choices=("train", "validation"), default="train", help="split (train)"
    )


def run_vocab(args: argparse.Namespace) -> None:
    """Runs `data vocab`."""
    from switch_jax.data import find_sources, read_vocabulary, sample_texts, train_vocabulary

    config, output = load_config_argument(args), as_path(args.output)
    if output.exists():
        raise UserError(f"{output} exists; choose another --output.")
    if not is_bucket(output) and not output.absolute().parent.is_dir():
        raise UserError(f"The folder of {output} does not exist; choose another --output.")
    if not 0 < args.megabytes < 1e6:
        raise UserError(f"--megabytes must be above 0 and below a million, not {args.megabytes}.")
    texts = sample_texts(config.data, find_sources(config.data), round(args.megabytes * 1e6))
    with staged_file(output) as file:
        train_vocabulary(texts, file, config.model.vocab_size, args.coverage)
    vocabulary = read_vocabulary(output)
    print(
        f"{output}: {vocabulary.size:,} ids, 100 sentinels included; train with"
        f" data.vocabulary={output} and model.vocab_size={vocabulary.padded_size}"
    )


def run_pack(args: argparse.Namespace) -> int:
    """Runs `data pack`."""
    from switch_jax.data import build_token_store, open_vocabulary, store_table

    config, output = load_config_argument(args), as_path(args.output)
    if args.runner is None and args.pipeline_options is not None:
        raise UserError("--pipeline_options are Beam's; name its --runner, too.")
    if args.runner and args.workers:
        raise UserError(
            "--workers are processes of this machine; leave it out, and name the number for"
            f" {args.runner} in --pipeline_options."
        )
    beam_options = args.runner and [f"--runner={args.runner}", *(args.pipeline_options or ())]
    workers = args.workers or os.cpu_count() or 1
    try:
        vocabulary = open_vocabulary(config)
        manifest = build_token_store(config.data, vocabulary, output, workers, beam_options)
    except KeyboardInterrupt:
        print("Stopped; the same command continues from there.")
        return 130
    print(store_table(manifest))
    names = ",".join(manifest["sources"])
    flags = ["--config.data.reader=store", f"--config.data.data_dir={output}"]
    flags += [f"--config.data.mixture={names}"] if len(names) < 60 else []
    print(f"Train on it with {shlex.join(flags)}")
    return 0


def run_peek(args: argparse.Namespace) -> None:
    """Runs `data peek`."""
    from switch_jax.data import examples_text

    print(examples_text(load_config_argument(args), args.count, args.split))
