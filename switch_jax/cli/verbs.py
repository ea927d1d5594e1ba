"""What each verb of the command line does; heavy modules are imported by those that need them."""

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from switch_jax.errors import UserError

if TYPE_CHECKING:
    from switch_jax.checkpoint import Workdir
    from switch_jax.config import Config


def _load_config(args: argparse.Namespace) -> "Config":
    from switch_jax.config import load_config

    return load_config(args.config, args.overrides)


def _start(args: argparse.Namespace, config: "Config | None" = None) -> None:
    """Starts JAX, and finds the other processes where there are several."""
    from switch_jax.config import flatten_config
    from switch_jax.distributed import launch_from_flags

    flags = None
    if hasattr(args, "process_id"):
        flags = launch_from_flags(args.coordinator, args.num_processes, args.process_id)
    facts = {"the verb": args.verb}
    if hasattr(args, "workdir"):
        facts["--workdir"] = os.path.abspath(args.workdir)
    facts |= args.overrides if config is None else flatten_config(config)
    from switch_jax.cli.startup import start_jax

    start_jax(flags, facts)


def _show(text: str) -> None:
    """Prints a result; of several processes, the first does."""
    import jax

    if jax.process_index() == 0:
        print(text)


def train(args: argparse.Namespace) -> int:
    config = _load_config(args)
    _start(args, config)
    from switch_jax.checkpoint import Workdir
    from switch_jax.training import train

    stopped_by = train(config, Workdir(args.workdir))
    return 0 if stopped_by is None else 128 + stopped_by


def _find_checkpoint(args: argparse.Namespace) -> "tuple[Workdir, Path, Config]":
    """WORKDIR and checkpoint of `--workdir`, and the config they are used with."""
    from switch_jax.checkpoint import find_checkpoint_together
    from switch_jax.config import override_config

    _start(args)
    workdir, folder = find_checkpoint_together(args.workdir)
    made_with = override_config(workdir.config(), args.overrides)
    return workdir, folder, _load_config(args) if args.config else made_with


def eval(args: argparse.Namespace) -> None:
    from switch_jax.evaluation import evaluate_checkpoint, scores_table

    metrics = evaluate_checkpoint(*_find_checkpoint(args))
    shown = ("cross_entropy", "neg_log_perplexity", "accuracy", "unigram_entropy")
    lines = [f"{name:20} {metrics[name]:.4f}" for name in shown]
    for name, value in metrics.items():
        if name.endswith("/cross_entropy"):  # of one source among several
            shown_as = name.removesuffix("/cross_entropy")
            lines.append(f"  of {shown_as:15} {value:.4f}")
    text = "\n".join([*lines, "", scores_table(metrics)]).rstrip()
    _show(json.dumps(metrics) if args.json else text)


def experts(args: argparse.Namespace) -> None:
    if args.output and Path(args.output).is_file():
        raise UserError(f"{args.output} is a file; name a folder as --output.")
    import jax

    from switch_jax.analysis import (
        analyse_experts,
        expert_table,
        import_matplotlib,
        write_expert_report,
    )

    import_matplotlib()  # missing: say so before anything is computed
    workdir, folder, config = _find_checkpoint(args)
    text = None if args.input is None else Path(args.input)
    analysis = analyse_experts(workdir, folder, config, text)
    if jax.process_index():
        return
    output = Path(args.output) if args.output else workdir.experts
    written = write_expert_report(analysis, output)
    if args.json:
        print(json.dumps(analysis))
    else:
        print("\n".join([*map(str, written), "", expert_table(analysis)]))


def generate(args: argparse.Namespace) -> None:
    if args.input and not Path(args.input).is_file():
        raise UserError(f"Input file {args.input!r} does not exist.")
    texts = [args.text]
    if args.input:  # other ends of lines are part of a text
        texts = Path(args.input).read_text(errors="replace").removesuffix("\n").split("\n")
    from switch_jax.checkpoint import find_checkpoint_together, load
    from switch_jax.data import read_vocabulary
    from switch_jax.inference import SamplingOptions, fill_blanks

    options = SamplingOptions(
        beam_size=args.beam_size,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    _start(args)
    workdir, folder = find_checkpoint_together(args.workdir)
    vocabulary = read_vocabulary(workdir.vocabulary)
    model = load(folder)
    for text in fill_blanks(model, vocabulary, texts, max_length=args.max_length, options=options):
        _show(text)


def export(args: argparse.Namespace) -> None:
    from switch_jax.checkpoint import find_pretrained, load
    from switch_jax.inference import export_model

    _start(args)
    source = find_pretrained(args.workdir)
    data = source.config.data
    export_model(
        load(args.workdir),
        Path(args.output),
        inputs_length=args.inputs_length or data.inputs_length,
        max_length=args.max_length or data.targets_length,
        vocabulary=source.vocabulary,
    )
    print(f"{args.output}: greedy.py there shows how to call it.")


def inspect(args: argparse.Namespace) -> None:
    from switch_jax.checkpoint import Workdir
    from switch_jax.config import override_config
    from switch_jax.distributed import chip_of_topology
    from switch_jax.performance import (
        cost_summary,
        cost_table,
        suggest_meshes,
        suggestion_to_json,
        suggestions_table,
    )

    if args.workdir:
        config = override_config(Workdir(args.workdir).config(), args.overrides)
    else:
        config = _load_config(args)
    teacher = None
    if config.distilled:
        from switch_jax.training import teacher_config

        teacher = teacher_config(config)
    summary, suggestions = cost_summary(config, teacher), []
    if args.topology:
        chip, devices = chip_of_topology(args.topology)
        suggestions = suggest_meshes(config, chip, devices * args.slices, args.slices, teacher)
        summary["meshes"] = [suggestion_to_json(suggestion) for suggestion in suggestions]
    if args.json:
        print(json.dumps(summary))
    else:
        print(cost_table(summary))
        if config.init_from is not None:
            from switch_jax.training import initial_state_report

            print("", f"From {config.init_from}:", initial_state_report(config), sep="\n")
        if suggestions:
            print("", suggestions_table(suggestions), sep="\n")


def compile(args: argparse.Namespace) -> None:
    config = _load_config(args)
    from switch_jax.analysis import import_matplotlib
    from switch_jax.performance import (
        CompileTarget,
        compile_step,
        compile_table,
        draw_placement,
        remedy,
    )

    if args.output:
        import_matplotlib()  # missing: say so before minutes of compilation
    target = CompileTarget(args.topology, args.slices)
    result = compile_step(config, target)
    if args.output:
        draw_placement(result, Path(args.output))
    print(json.dumps(result) if args.json else compile_table(result), flush=True)
    if not result["fits"]:
        raise UserError(remedy(config, target, result))


def bench(args: argparse.Namespace) -> None:
    config = _load_config(args)
    _start(args, config)
    from switch_jax.performance import benchmark_table, run_benchmark

    result = run_benchmark(config, args.repeats)
    _show(json.dumps(result) if args.json else benchmark_table(result))


def plot(args: argparse.Namespace) -> None:
    from switch_jax.analysis import common_sources, compare_sources, draw_run_plots, speedup_table
    from switch_jax.checkpoint import Workdir, read_metrics

    workdirs = [Workdir(path) for path in args.workdir]
    folder = Path(args.output) if args.output else workdirs[0].figures
    for path in draw_run_plots(workdirs, folder):
        print(path)
    runs = [read_metrics(workdir) for workdir in workdirs]
    if len(runs) == 2 and common_sources(*runs):
        print("", speedup_table(compare_sources(*runs), *args.workdir), sep="\n")


def sweep(args: argparse.Namespace) -> int:
    import shlex

    import jax

    from switch_jax.analysis import import_matplotlib
    from switch_jax.distributed import detect_launch
    from switch_jax.sweeps import (
        load_sweep,
        prepare_sweep,
        ready_jobs,
        run_sweep,
        sweep_jobs,
        write_report,
    )

    import_matplotlib()  # missing: say so before anything is trained
    jax.config.update("jax_platforms", "cpu")  # here; the accelerator is for the runs
    made, folder = load_sweep(args.config).but(args.overrides), Path(args.workdir)
    jobs = sweep_jobs(made, folder)
    prepare_sweep(jobs, folder)
    if args.commands:
        print("\n".join(shlex.join(job.command()) for job in ready_jobs(jobs)))
        return 0
    if detect_launch(seconds=10) is not None:
        raise UserError(
            "A sweep trains one run after the other, each as one process, and this is one of"
            " several; start what --commands prints with your launcher."
        )
    progress = run_sweep(jobs)
    if progress.finished:
        print("\n".join(map(str, write_report(made, jobs, folder))))
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
    from switch_jax.data import find_sources, read_vocabulary, sample_texts, train_vocabulary

    config, output = _load_config(args), Path(args.output)
    if output.exists() or not output.absolute().parent.is_dir():
        raise UserError(f"{output} exists, or its folder does not; choose another --output.")
    if not 0 < args.megabytes < 1e6:
        raise UserError(f"--megabytes must be above 0 and below a million, not {args.megabytes}.")
    texts = sample_texts(config.data, find_sources(config.data), round(args.megabytes * 1e6))
    train_vocabulary(texts, output, config.model.vocab_size, args.coverage)
    vocabulary = read_vocabulary(output)
    print(
        f"{output}: {vocabulary.size:,} ids, 100 sentinels included; train with"
        f" data.vocabulary={output} and model.vocab_size={vocabulary.padded_size}"
    )


def data_pack(args: argparse.Namespace) -> int:
    from switch_jax.data import build_summary, build_token_store, open_vocabulary

    config, output = _load_config(args), Path(args.output)
    try:
        manifest = build_token_store(config.data, open_vocabulary(config), output, args.workers)
    except KeyboardInterrupt:
        print("Stopped; the same command continues from there.")
        return 130
    print(build_summary(manifest))
    names = ",".join(manifest["sources"])
    print(
        f"Train on it with --config.data.reader=store --config.data.data_dir={output}"
        + (f" --config.data.mixture={names}" if len(names) < 60 else "")
    )
    return 0


def data_peek(args: argparse.Namespace) -> None:
    from switch_jax.data import peek

    print(peek(_load_config(args), args.count, args.split))


def convert_from_hf(args: argparse.Namespace) -> None:
    from switch_jax.checkpoint import read_hugging_face, write_workdir

    imported = read_hugging_face(Path(args.source))
    write_workdir(imported, Path(args.output))
    print("\n".join([*imported.notes, f"{args.output}: use it as --workdir, or as init_from"]))


def convert_from_t5x(args: argparse.Namespace) -> None:
    from switch_jax.checkpoint import read_t5x, write_workdir

    imported = read_t5x(Path(args.source))
    write_workdir(imported, Path(args.output))
    print("\n".join([*imported.notes, f"{args.output}: use it as --workdir, or as init_from"]))


def convert_upcycle(args: argparse.Namespace) -> None:
    from switch_jax.checkpoint import find_pretrained, upcycle, write_workdir
    from switch_jax.config import override_config

    _start(args)
    source = find_pretrained(args.source)
    source.say_notes()
    made_with = override_config(source.config, args.overrides)
    config = _load_config(args) if args.config else made_with
    write_workdir(upcycle(source, config), Path(args.output))
    print(f"{args.output}: use it as --workdir, or as init_from")


def convert_to_hf(args: argparse.Namespace) -> None:
    from switch_jax.checkpoint import export_hugging_face

    notes = export_hugging_face(args.source, Path(args.output))
    print("\n".join([*notes, f"{args.output}: transformers' from_pretrained takes it"]))
