"""Values, files, paths and environments of the bad inputs."""

from collections.abc import Iterator
from typing import Any

_BAD_BY_TYPE: dict[type, tuple[str, ...]] = {
    int: ("wide", "1.5", "nan", "[]", "99999999999999999999"),
    float: ("wide", "nan", "inf", "[]", "1e999"),
    bool: ("maybe", "2", "[]"),
}
_MAY_BE_NEGATIVE = {"train.seed", "data.seed"}


def config_values() -> Iterator[tuple[str, str]]:
    """Yields key and value for every config key of which the type tells what is wrong."""
    from switch_jax.config import defaults, flatten_config
    from switch_jax.config.load import config_from_dict

    for key, default in flatten_config(config_from_dict(defaults().to_dict())).items():
        bad = _BAD_BY_TYPE.get(type(default), ())
        yield from ((key, value) for value in bad)
        if type(default) in (int, float) and key not in _MAY_BE_NEGATIVE:
            yield key, "-3"
    yield from _WRONG_TEXTS


_WRONG_TEXTS = (
    ("model.activation", "swish"),
    ("model.dtype", "float8"),
    ("model.remat", "some"),
    ("moe.router", "best"),
    ("moe.stacks", "all"),
    ("moe.sublayer", "mlp"),
    ("moe.top_k", "0"),
    ("moe.top_k", "99"),
    ("moe.first", "-1"),
    ("moe.capacity_factor", "0"),
    ("moe.capacity_factor", "-1"),
    ("moe.expert_capacity", "0"),
    ("moe.every", "0"),
    ("data.mixture", ""),
    ("data.mixture", ","),
    ("data.mixture", "no_such_source"),
    ("data.mixture", "text=nan"),
    ("data.mixture", "text=-1"),
    ("data.mixture", "text=0"),
    ("data.mixture", "text=1,text=2"),
    ("data.reader", "csv"),
    ("data.counts", "no_such.json"),
    ("data.counts", "tiny.py"),
    ("data.vocabulary", "no_such.model"),
    ("data.vocabulary", "tiny.py"),
    ("data.data_dir", "no_such"),
    ("data.batch_size", "0"),
    ("data.inputs_length", "0"),
    ("data.targets_length", "0"),
    ("optimizer.name", "adam"),
    ("optimizer.schedule", "step"),
    ("optimizer.trained", "("),
    ("optimizer.trained", "no_such_parameter"),
    ("train.keep_best", "no_such_metric"),
    ("train.accumulate", "3"),
    ("train.steps", "0"),
    ("train.log_every", "0"),
    ("train.keep_checkpoints", "0"),
    ("lora.of", "["),
    ("mesh.data", "0"),
    ("mesh.data", "64"),
    ("mesh.model", "3"),
    ("init_from", "no_such"),
    ("init_from", "tiny.py"),
    ("init_rules", "a -> b"),
    ("init_rules", "->"),
    ("init_rules", "( -> x"),
    ("init_optimizer", "loaded"),
    ("distill.teacher", "no_such"),
    ("distill.temperature", "0"),
    ("eval.method", "guess"),
    ("eval.beam_size", "0"),
    ("model.d_model", "0"),
    ("model.vocab_size", "0"),
    ("model.vocab_size", "7"),  # fewer than the vocabulary has
    ("model.dropout_rate", "1.5"),
    ("no_such_key", "1"),
    ("model.no_such_key", "1"),
    ("model", "1"),
    ("", "1"),
    ("model.", "1"),
    ("model.d_model.more", "1"),
)
NEED_TRAINING = (
    *("data.", "distill.", "init_", "mesh.", "model.vocab_size", "optimizer.trained"),
    "train.keep_best",
)
# Unusual, and not always wrong.
ODD_CONFIG_VALUES = (
    ("optimizer.cooldown_steps", "1000"),
    ("optimizer.warmup_steps", "100000000"),
    ("model.d_model", "2000000000"),
    ("model.d_ff", "9000000000000000000"),
    ("moe.num_experts", "1000000000"),
    ("data.batch_size", "1000000000000"),
    ("train.seed", "-1"),
    ("train.seed", "9223372036854775807"),
    ("data.seed", "18446744073709551616"),
    ("model.init_scale", "1e-300"),
    ("optimizer.learning_rate", "0"),
    ("model.d_model", "0x10"),
    ("model.d_model", " 16"),
    ("model.d_model", "1_6"),
    ("model.d_model", "__import__('os')"),
    ("model.d_model", "(" * 3000),
    ("model.d_model", "1" * 5000),
    ("model.d_model", "[" * 1000 + "]" * 1000),
    ("data.data_dir", "2024"),
    ("data.data_dir", "{[]: 1}"),
    ("data.vocabulary", "None"),
    ("data.vocabulary", "bytes"),
    ("data.rate_exponent", "1e300"),
    ("train.keep_best", "None"),
    ("train.keep_best", "[/bold]"),
    ("init_rules", ";;;"),
    ("init_rules", "(a+)+$ -> b"),
    ("optimizer.trained", "(a+)+$"),
    ("moe.capacity_factor", "1e300"),
    ("moe.jitter", "1"),
    ("train.idle_expert_steps", "0"),
    ("train.steps", "9223372036854775808"),
)
CONFIG_SPECS = (
    "",
    ":",
    "tiny.py:no_such=1",
    "tiny.py:=",
    "no_such",
    "no_such.py",
    "store",
    "switch_mini:num_experts=many",
    "switch_mini:num_experts=-1",
    "switch_mini:num_experts=99999999999999999999",
    "switch_mini:num_experts=" + "[" * 3000,
    "../" * 50 + "etc/passwd",
    "run/config.json",
    "text-train.jsonl",
    "vocabulary.model",
    "x" * 5000,
    "a\nb",
)
_DEFAULTS = "from switch_jax.config import defaults\ndef get_config(arg=''):\n    "
CONFIG_FILES: dict[str, bytes] = {
    "empty": b"",
    "syntax error": b"def get_config(:\n",
    "raises": b"def get_config(arg=''):\n    raise ValueError('no')\n",
    "raises at import": b"1 / 0\n",
    "raises without words": b"def get_config(arg=''):\n    raise KeyError\n",
    "recursion": b"def get_config(arg=''):\n    return get_config(arg)\n",
    "exits": b"import sys\nsys.exit(0)\n",
    "exits in the function": b"def get_config(arg=''):\n    raise SystemExit(5)\n",
    "interrupts": b"raise KeyboardInterrupt\n",
    "missing import": b"import no_such_module\n",
    "no function": b"config = 1\n",
    "function is no function": b"get_config = get_sweep = 5\n",
    "other arguments": b"def get_config(a, b):\n    return a\nget_sweep = get_config\n",
    "returns nothing": b"def get_config(arg=''):\n    pass\nget_sweep = get_config\n",
    "returns a number": b"def get_config(arg=''):\n    return 7\nget_sweep = get_config\n",
    "returns a dict": b"def get_config(arg=''):\n    return {1: 2}\nget_sweep = get_config\n",
    "returns a class": b"class get_config:\n    pass\nget_sweep = get_config\n",
    "unknown key": (_DEFAULTS + "c = defaults(); c.model.width = 3; return c\n").encode(),
    "group is a number": (_DEFAULTS + "c = defaults(); c.model = 3; return c\n").encode(),
    "value is an object": (
        _DEFAULTS + "c = defaults(); c.train.steps = object(); return c\n"
    ).encode(),
    "contains itself": (_DEFAULTS + "c = defaults(); c.model.d_ff = c; return c\n").encode(),
    "Latin-1": "# größe\ndef get_config(arg=''):\n    return None\n".encode("latin-1"),
    "NUL bytes": b"\0\0\0",
    "deep expression": b"x = " + b"(" * 500 + b")" * 500 + b"\n",
    "deep list": b"x = " + b"-" * 100_000 + b"1\n",
}
_SWEEP = (
    "from switch_jax.sweeps import *\n"
    "RUN = SweepRun('tiny.py', {'train.steps': 2})\n"
    "def get_sweep(arg=''):\n    return Sweep('Title', "
)
SWEEP_FILES: dict[str, str] = {
    label: f"{_SWEEP}{arguments})\n"
    for label, arguments in {
        "no runs": "{}",
        "runs are a list": "[RUN]",
        "runs are nothing": "None",
        "a run is a text": "{'a': 'tiny.py'}",
        "a run is nothing": "{'a': None}",
        "a name is a number": "{1: RUN}",
        "a name is a path": "{'../a': RUN}",
        "an empty name": "{'': RUN}",
        "a name with markup": "{'[/x]': RUN}",
        "seeds are a number": "{'a': RUN}, seeds=1",
        "no seeds": "{'a': RUN}, seeds=()",
        "seeds are texts": "{'a': RUN}, seeds=('x',)",
        "a seed twice": "{'a': RUN}, seeds=(1, 1)",
        "a seed is huge": "{'a': RUN}, seeds=(10**30,)",
        "tables are a tuple": "{'a': RUN}, tables=(Table('t', 'c', {'A': 'a'}),)",
        "a table is a text": "{'a': RUN}, tables={'t': 'table'}",
        "a table's rows are a list": "{'a': RUN}, tables={'t': Table('t', 'c', ['a'])}",
        "a table without rows": "{'a': RUN}, tables={'t': Table('t', 'c', {})}",
        "a table of an unknown run": "{'a': RUN}, tables={'t': Table('t', 'c', {'A': 'b'})}",
        "a table's name is a path": "{'a': RUN}, tables={'../../t': Table('t', 'c', {'A': 'a'})}",
        "figures are a list": "{'a': RUN}, figures=[1]",
        "a figure is a number": "{'a': RUN}, figures={'f': 3}",
        "a figure without runs": "{'a': RUN}, figures={'f': Curves('f', 'c', {})}",
        "a figure by unknown x": "{'a': RUN}, figures={'f': Curves('f', 'c', {'A': 'a'}, 'z')}",
        "overrides are a list": "{'a': SweepRun('tiny.py', [1])}",
        "an unknown key": "{'a': SweepRun('tiny.py', {'train.step': 2})}",
        "a key is a number": "{'a': SweepRun('tiny.py', {1: 2})}",
        "a bad value": "{'a': SweepRun('tiny.py', {'train.steps': 'two'})}",
        "an unknown config": "{'a': SweepRun('no_such.py')}",
        "a config is a number": "{'a': SweepRun(7)}",
        "a circle": "{'a': SweepRun('tiny.py', {'init_from': '{run:b}'}),"
        " 'b': SweepRun('tiny.py', {'init_from': '{run:a}'})}",
        "itself": "{'a': SweepRun('tiny.py', {'init_from': '{run:a}'})}",
        "an unknown reference": "{'a': SweepRun('tiny.py', {'init_from': '{run:z}'})}",
        "unequal steps": "{'a': RUN, 'b': SweepRun('tiny.py', {'train.steps': 4})},"
        " tables={'t': Table('t', 'c', {'A': 'a', 'B': 'b'})}",
    }.items()
}
# Verb → flag → values that must be refused.
FLAGS: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    ("generate", "--max_length", ("0", "-1", "x", "1.5", "99999999999999999999", "")),
    ("generate", "--beam_size", ("0", "-1", "x", "99999999999999999999")),
    ("generate", "--temperature", ("nan", "-1", "inf", "x", "")),
    ("generate", "--top_k", ("-5", "x", "1.5", "99999999999999999999")),
    ("generate", "--top_p", ("nan", "-1", "2", "0", "x")),
    ("generate", "--seed", ("x", "1.5", "99999999999999999999")),
    ("generate", "--input", ("no_such.txt", "store", "")),
    ("generate", "--text", (b"caf\xe9",)),
    ("generate", "--no_such_flag", ("1",)),
    ("eval", "--config", ("no_such", "store", "")),
    ("eval", "--num_processes", ("0", "-1", "x", "2")),
    ("eval", "--process_id", ("-1", "7", "x")),
    ("eval", "--coordinator", ("", "x", "localhost", "localhost:x", "localhost:99999")),
    ("train", "--num_processes", ("0", "-1", "x", "2")),
    ("train", "--process_id", ("-1", "7", "x")),
    ("train", "--coordinator", ("", "x", "localhost", "localhost:x", "localhost:99999", ":1")),
    ("bench", "--repeats", ("0", "-1", "x", "1.5")),
    ("compile", "--topology", ()),
    ("compile", "--slices", ("0", "-1", "x", "99999999999999999999")),
    ("compile", "--output", ("x.svg2", "store", "a/b/c.png")),
    ("data vocab", "--megabytes", ("nan", "-1", "0", "inf", "1e30", "x")),
    ("data vocab", "--coverage", ("nan", "-1", "0", "2", "x")),
    ("data pack", "--workers", ("0", "-1", "x", "1.5")),
    ("data peek", "--count", ("0", "-1", "x")),
    ("data peek", "--split", ("test", "")),
    ("export", "--inputs_length", ("0", "-1", "x", "99999999999999999999")),
    ("export", "--max_length", ("0", "-1", "x", "99999999999999999999")),
    ("experts", "--input", ("no_such.txt", "store", "")),
    ("plot", "--workdir", ("no_such", "store", "", "tiny.py")),
    ("inspect", "--slices", ("0", "-1", "x")),
    ("sweep", "--config", ("no_such", "tiny.py", "")),
    *(
        (verb, "--topology", topologies)
        for topologies in (
            (
                *("", ":", "v5p", "v5p:", "v5p:0x1", "v5p:0x0x0", "v5p:-1x1x1", "v5p:8x16x16x2"),
                *("v5p:8x", "v5p:axb", "v9:2x2", "cpu:0", "cpu:-1", "cpu:x", "cpu:1.5"),
                *("cpu:99999999999999999999", "v5p:99999999999x1x1", "gpu:", "h100:0", "h100:x"),
            ),
        )
        for verb in ("compile", "inspect")
    ),
)
# JSON file of the world → verbs that read it.
JSON_FILES = {
    "hf/config.json": ("convert from-hf",),
    "hf/generation_config.json": ("convert from-hf",),
    "hf/model.safetensors.index.json": ("convert from-hf",),
    "run/config.json": ("eval", "generate", "inspect", "convert to-hf", "export", "experts"),
    "run/metrics.jsonl": ("plot",),
    "store/manifest.json": ("data peek", "train"),
}
BAD_DATA: dict[str, bytes] = {
    "empty": b"",
    "blank lines": b"\n\n\n",
    "no JSON": b"hello\n" * 5,
    "other JSON": b"[1, 2]\n" * 5,
    "other fields": b'{"body": "hello"}\n' * 5,
    "empty texts": b'{"text": "", "inputs": "", "targets": ""}\n' * 5,
    "numbers as text": b'{"text": 7, "inputs": 7, "targets": 7}\n' * 5,
    "not UTF-8": b'{"text": "caf\xe9", "inputs": "caf\xe9", "targets": "\xe9"}\n' * 5,
    "deep": b"[" * 100_000 + b"\n",
    "NUL bytes": b"\0" * 1000,
}
BAD_TEXTS: dict[str, bytes] = {
    "empty": b"",
    "not UTF-8": b"caf\xe9 ___\n",
    "NUL bytes": b"\0\0\0\n",
    "blank lines": b"\n\n\n",
    "many blanks": b"___ " * 200 + b"\n",
    "unknown sentinel": b"<extra_id_999> <extra_id_-1>\n",
    "long": b"word " * 20_000 + b"\n",
    "other characters": "日本語 🙂 \u202e ___\n".encode(),
    "line separators": "a\u2028b\x0b\x0c\rc\n".encode(),
    "markup": b"[/bold] $x^2$ <script>&amp; ___\n",
}
WRITING_VERBS = (
    *("train", "data pack", "data vocab", "convert from-hf", "convert to-hf", "convert upcycle"),
    *("export", "experts", "plot"),
)
READING_VERBS = (
    *("eval", "generate", "export", "plot", "inspect", "convert to-hf", "convert from-hf"),
    "convert from-t5x",
)
ODD_PATHS = (
    "a b",
    "a%20b",
    "a#b",
    "a?b",
    "a[1]",
    "a\\b",
    "a,b=c",
    "größe",
    "a'b\"c",
    "[bold]x[/x]",
    "$x_2$",
    "{run}",
    "*",
    "-",
    "...",
    "a\tb",
    "checkpoints/7",
    "n" * 200,
)
BAD_PATHS = (
    "",
    "a_file/new",
    "/dev/null",
    "/dev/null/new",
    "/proc/new",
    "n" * 300,
    "a\nb/../../../../../../../../../proc/x",
    "no_such_user/../" * 300,
)
ENVIRONMENT = (
    ("SLURM_STEP_NUM_TASKS", ""),
    ("SLURM_NTASKS", "x"),
    ("SLURM_NTASKS", "-1"),
    ("SLURM_PROCID", "99"),
    ("SLURM_JOB_ID", "x"),
    ("SLURM_STEP_NODELIST", "a[1-"),
    ("OMPI_COMM_WORLD_SIZE", "x"),
    ("OMPI_COMM_WORLD_SIZE", ""),
    ("OMPI_COMM_WORLD_RANK", "5"),
    ("TPU_WORKER_ID", "x"),
    ("TPU_WORKER_HOSTNAMES", ","),
    ("MEGASCALE_NUM_SLICES", "x"),
    ("JOB_COMPLETION_INDEX", "x"),
    ("SWITCH_JAX_START_TIMEOUT", "x"),
    ("SWITCH_JAX_START_TIMEOUT", "-1"),
    ("SWITCH_JAX_CACHE", "/dev/null"),
    ("SWITCH_JAX_CACHE", "/proc/x"),
    ("SWITCH_JAX_CACHE", "a%20b"),
    ("JAX_COMPILATION_CACHE_DIR", "/dev/null/x"),
    ("HOME", "/no/such"),
    ("HOME", ""),
    ("LANG", "C"),
    ("LC_ALL", "xx_YY"),
    ("PYTHONIOENCODING", "ascii"),
    ("COLUMNS", "0"),
    ("COLUMNS", "x"),
    ("TERM", "no_such_terminal"),
    ("TZ", "no/such"),
    ("TMPDIR", "/no/such"),
    ("PYTHONHASHSEED", "0"),
)
