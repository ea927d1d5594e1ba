"""What each verb of the command line does; heavy modules are imported by those that need them."""

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from switch_jax.errors import UserError

if TYPE_CHECKING:
    from switch_jax.schema import Config
    from switch_jax.workdir import Workdir


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


def train(args: argparse.Namespace) -> int:
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


def eval(args: argparse.Namespace) -> None:
    from switch_jax.evaluate import evaluate_checkpoint
    from switch_jax.scoring import render

    metrics = evaluate_checkpoint(*_find_checkpoint(args))
    shown = ("cross_entropy", "neg_log_perplexity", "accuracy", "unigram_entropy")
    lines = [f"{name:20} {metrics[name]:.4f}" for name in shown]
    for name, value in metrics.items():
        if name.endswith("/cross_entropy"):  # of one source among several
            shown_as = name.removesuffix("/cross_entropy")
            lines.append(f"  of {shown_as:15} {value:.4f}")
    text = "\n".join([*lines, "", render(metrics)]).rstrip()
    _show(json.dumps(metrics) if args.json else text)


def experts(args: argparse.Namespace) -> None:
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


def generate(args: argparse.Namespace) -> None:
    if args.input and not Path(args.input).is_file():
        raise UserError(f"Input file {args.input!r} does not exist.")
    texts = [args.text]
    if args.input:  # other ends of lines are part of a text
        texts = Path(args.input).read_text(errors="replace").removesuffix("\n").split("\n")
    from switch_jax import checkpoint, pretrained
    from switch_jax.data.vocabulary import read
    from switch_jax.decode import complete
    from switch_jax.search import Options

    options = Options(
        beam_size=args.beam_size,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    _start(args)
    workdir, folder = checkpoint.find_together(args.workdir)
    vocabulary = read(workdir.vocabulary)
    model = pretrained.load(folder)
    for text in complete(model, vocabulary, texts, max_length=args.max_length, options=options):
        _show(text)


def export(args: argparse.Namespace) -> None:
    from switch_jax import export, pretrained

    _start(args)
    source = pretrained.find(args.workdir)
    data = source.config.data
    export.write(
        pretrained.load(args.workdir),
        Path(args.output),
        inputs_length=args.inputs_length or data.inputs_length,
        max_length=args.max_length or data.targets_length,
        vocabulary=source.vocabulary,
    )
    print(f"{args.output}: greedy.py there shows how to call it.")


def inspect(args: argparse.Namespace) -> None:
    from switch_jax import accounting, chips, meshes
    from switch_jax import config as config_lib
    from switch_jax.workdir import Workdir

    if args.workdir:
        config = config_lib.override(Workdir(args.workdir).config(), args.overrides)
    else:
        config = _load_config(args)
    teacher = None
    if config.distilled:
        from switch_jax import distill

        teacher = distill.teacher(config)
    summary, suggestions = accounting.summary(config, teacher), []
    if args.topology:
        chip, devices = chips.of_topology(args.topology)
        suggestions = meshes.suggest(config, chip, devices * args.slices, args.slices, teacher)
        summary["meshes"] = [meshes.as_json(suggestion) for suggestion in suggestions]
    if args.json:
        print(json.dumps(summary))
    else:
        print(accounting.render(summary))
        if config.init_from is not None:
            from switch_jax import initial

            print("", f"From {config.init_from}:", initial.report(config), sep="\n")
        if suggestions:
            print("", meshes.render(suggestions), sep="\n")


def compile(args: argparse.Namespace) -> None:
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


def bench(args: argparse.Namespace) -> None:
    config = _load_config(args)
    _start(args, config)
    from switch_jax import bench

    result = bench.run(config, args.repeats)
    _show(json.dumps(result) if args.json else bench.render(result))


def plot(args: argparse.Namespace) -> None:
    from switch_jax import plots, speedup
    from switch_jax.report import read_metrics
    from switch_jax.workdir import Workdir

    workdirs = [Workdir(path) for path in args.workdir]
    folder = Path(args.output) if args.output else workdirs[0].figures
    for path in plots.draw(workdirs, folder):
        print(path)
    runs = [read_metrics(workdir) for workdir in workdirs]
    if len(runs) == 2 and speedup.common_sources(*runs):
        print("", speedup.render(speedup.compare(*runs), *args.workdir), sep="\n")


def sweep(args: argparse.Namespace) -> int:
    import shlex

    import jax

    from switch_jax import launch, plots, runner, sweep, sweep_report

    plots.matplotlib()  # missing: say so before anything is trained
    jax.config.update("jax_platforms", "cpu")  # here; the accelerator is for the runs
    made, folder = sweep.load(args.config).but(args.overrides), Path(args.workdir)
    jobs = runner.jobs(made, folder)
    runner.prepare(jobs, folder)
    if args.commands:
        print("\n".join(shlex.join(job.command()) for job in runner.ready(jobs)))
        return 0
    if launch.detect(seconds=10) is not None:
        raise UserError(
            "A sweep trains one run after the other, each as one process, and this is one of"
            " several; start what --commands prints with your launcher."
        )
    progress = runner.run(jobs)
    if progress.finished:
        print("\n".join(map(str, sweep_report.write(made, jobs, folder))))
    if progress.stopped_by is not None:
        print(
            f"Stopped with {progress.finished} of {len(jobs)} runs finished; the same command"
            " continues from there."
        )
        return 128 + progress.stopped_by
    if progress.failed:
        blocked = f", and {', '.join(progress.blocked)} need them" if progress.blocked else ""
        raise UserError(
            f"{len(progress.failed)} of {len(jobs)} runs failed ({', '.join(progress.failed)}; what"
            f" they printed is in {folder / 'jobs'}){blocked}; put that right, and the same command"
            " trains what is missing."
        )
    return 0


def data_vocab(args: argparse.Namespace) -> None:
    from switch_jax.data import mixture, vocabularies
    from switch_jax.data.vocabulary import read

    config, output = _load_config(args), Path(args.output)
    if output.exists() or not output.absolute().parent.is_dir():
        raise UserError(f"{output} exists, or its folder does not; choose another --output.")
    if not 0 < args.megabytes < 1e6:
        raise UserError(f"--megabytes must be above 0 and below a million, not {args.megabytes}.")
    texts = vocabularies.sample(
        config.data, mixture.find_sources(config.data), round(args.megabytes * 1e6)
    )
    vocabularies.train(texts, output, config.model.vocab_size, args.coverage)
    vocabulary = read(output)
    print(
        f"{output}: {vocabulary.size:,} ids, 100 sentinels included; train with"
        f" data.vocabulary={output} and model.vocab_size={vocabulary.padded_size}"
    )


def data_pack(args: argparse.Namespace) -> int:
    from switch_jax.data import open_vocabulary
    from switch_jax.data.pack import pack, render

    config, output = _load_config(args), Path(args.output)
    try:
        manifest = pack(config.data, open_vocabulary(config), output, args.workers)
    except KeyboardInterrupt:
        print("Stopped; the same command continues from there.")
        return 130
    print(render(manifest))
    names = ",".join(manifest["sources"])
    print(
        f"Train on it with --config.data.reader=store --config.data.data_dir={output}"
        + (f" --config.data.mixture={names}" if len(names) < 60 else "")
    )
    return 0


def data_peek(args: argparse.Namespace) -> None:
    from switch_jax.data.peek import peek

    print(peek(_load_config(args), args.count, args.split))


def convert_from_hf(args: argparse.Namespace) -> None:
    from switch_jax.interop import huggingface
    from switch_jax.interop.writing import write_workdir

    imported = huggingface.read(Path(args.source))
    write_workdir(imported, Path(args.output))
    print("\n".join([*imported.notes, f"{args.output}: use it as --workdir, or as init_from"]))


def convert_from_t5x(args: argparse.Namespace) -> None:
    from switch_jax.interop import t5x
    from switch_jax.interop.writing import write_workdir

    imported = t5x.read(Path(args.source))
    write_workdir(imported, Path(args.output))
    print("\n".join([*imported.notes, f"{args.output}: use it as --workdir, or as init_from"]))


def convert_upcycle(args: argparse.Namespace) -> None:
    from switch_jax import config as config_lib
    from switch_jax import pretrained
    from switch_jax.interop.writing import write_workdir
    from switch_jax.upcycle import upcycle

    _start(args)
    source = pretrained.find(args.source)
    source.say_notes()
    if args.config:
        config = _load_config(args)
    else:
        config = config_lib.override(source.config, args.overrides)
    write_workdir(upcycle(source, config), Path(args.output))
    print(f"{args.output}: use it as --workdir, or as init_from")


def convert_to_hf(args: argparse.Namespace) -> None:
    from switch_jax.interop import hf_export

    notes = hf_export.export(args.source, Path(args.output))
    print("\n".join([*notes, f"{args.output}: transformers' from_pretrained takes it"]))
