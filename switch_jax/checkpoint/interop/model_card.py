"""Model card of an exported model: README.md with the front matter that Hugging Face's hub reads.

It says what the run has recorded and nothing else: no licence, and a language only where the
sources of text have one.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from switch_jax.checkpoint.metrics_log import QUALITY, read_metrics, sort_key
from switch_jax.checkpoint.workdir import Workdir
from switch_jax.config import Config
from switch_jax.files import absolute_path
from switch_jax.model import format_si

CARD = "README.md"
_LANGUAGES = {"c4": "en", "python_docstrings": "en"}  # of sources besides `mc4.LANGUAGE`
_DESCRIPTIONS = {
    "cross_entropy": "nats per target token",
    QUALITY: "negative cross-entropy",
    "accuracy": "share of the target tokens",
}


class ExportedModel(NamedTuple):
    """Facts of an exported model, for its card.

    step: number of train steps of the checkpoint; 0 for one that was converted.
    num_parameters: parameters, adapters merged.
    hugging_face: content of config.json.
    has_tokenizer: whether a vocabulary is beside it.
    """

    config: Config
    step: int
    num_parameters: int
    hugging_face: Mapping[str, Any]
    has_tokenizer: bool


def model_card(workdir: Workdir, model: ExportedModel) -> str:
    """Returns the card in Markdown. Raises `UserError` where the run's files are damaged."""
    lines = [line for line in read_metrics(workdir) if line["step"] <= model.step]
    evaluations = [line for line in lines if line["split"] == "eval"]
    last = evaluations[-1] if evaluations else {}
    name = absolute_path(workdir.location).name
    parts = [
        _front_matter(name, model, last),
        f"# {_plain(name)}",
        _description(model.config, model.num_parameters),
        "## Use",
        _use(model),
        "## Training",
        _training(workdir, model, lines),
        "## Evaluation",
        _evaluation(model.config, evaluations),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(name: str, model: ExportedModel, last: Mapping[str, Any]) -> str:
    """Returns YAML; its values are JSON, which YAML contains."""
    data: dict[str, Any] = {
        "library_name": "transformers",
        "tags": [model.hugging_face["model_type"], "switch_jax"],
    }
    if model.config.sparse:
        data["tags"].append("mixture-of-experts")
    if languages := _languages(model.config.data.mixture) if model.step else []:
        data["language"] = languages
    if metrics := _metrics(last):
        data["metrics"] = list(metrics)
        results = [{"type": key, "value": value} for key, value in metrics.items()]
        text = {"name": model.config.data.mixture, "type": "validation"}
        task = {"type": "text2text-generation"}
        result = {"task": task, "dataset": text, "metrics": results}
        data["model-index"] = [{"name": name, "results": [result]}]
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in data.items()]
    return "\n".join(["---", *lines, "---"])


def _languages(mixture: str) -> list[str]:
    """Returns the languages of a mixture's sources; none if that of any source is unknown."""
    sources = [part.partition("=")[0].strip() for part in mixture.split(",")]
    codes = {
        source.removeprefix("mc4.") if re.fullmatch(r"mc4\.[a-z]{2,3}", source) else ""
        for source in (f"mc4.{_LANGUAGES[s]}" if s in _LANGUAGES else s for s in sources)
    }
    return [] if "" in codes else sorted(codes)


def _description(config: Config, num_parameters: int) -> str:
    model, moe = config.model, config.moe
    kind = f"Switch Transformer with {moe.num_experts:,} experts" if config.sparse else "dense T5"
    return (
        f"A {kind} of {format_si(num_parameters, '').strip()} parameters: an encoder of"
        f" {model.num_encoder_layers} and a decoder of {model.num_decoder_layers} layers, d_model"
        f" {model.d_model:,}, d_ff {model.d_ff:,}, {model.num_heads} heads of {model.head_dim},"
        f" a vocabulary of {model.vocab_size:,}. It was exported by `switch-jax convert to-hf`."
    )


def _use(model: ExportedModel) -> str:
    """Returns how transformers and switch_jax load the folder."""
    [architecture] = model.hugging_face["architectures"]
    classes = ["AutoTokenizer", architecture] if model.has_tokenizer else [architecture]
    lines = [f"from transformers import {', '.join(classes)}", ""]
    if model.has_tokenizer:
        lines.append('tokenizer = AutoTokenizer.from_pretrained("FOLDER")')
    lines.append(f'model = {architecture}.from_pretrained("FOLDER")')
    ours = ["import switch_jax", "", 'model = switch_jax.load("FOLDER")']
    blocks = ["\n".join(["```python", *code, "```"]) for code in (lines, ours)]
    return "`FOLDER` is the folder of this file.\n\n" + "\n\n".join(blocks)


def _training(workdir: Workdir, model: ExportedModel, lines: list[dict[str, Any]]) -> str:
    """Returns a table of the run; for a checkpoint that was only converted, a sentence."""
    if model.step == 0:
        return (
            "None: the parameters were converted from another checkpoint or initialised, and not"
            " trained since. Its own card says how they were trained."
        )
    config, record = model.config, workdir.record()
    data = config.data
    tokens = next((line["tokens"] for line in reversed(lines) if "tokens" in line), None)
    rows = {
        "steps": f"{model.step:,} of {config.train.steps:,}",
        "target tokens": None if tokens is None else f"{tokens:,}",
        "text": _code(data.mixture),
        "objective": _code(data.objective),
        "batch": f"{data.batch_size:,} rows of {data.inputs_length:,} input tokens and"
        f" {data.targets_length:,} target tokens",
        "parameters of the start": None if config.init_from is None else _start(config.init_from),
        "seeds": f"{config.train.seed} (model), {data.seed} (data)",
        "devices": record.devices,
        "config digest": _code(record.config_digest),
        "switch_jax": f"{record.version or 'unknown'}, git revision"
        f" {record.git_revision or 'unknown'}",
    }
    return _table(("", ""), [(key, value) for key, value in rows.items() if value is not None])


def _start(path: str) -> str:
    """Returns the last two names of a path; those before are of the machine that trained."""
    return f"another checkpoint, {_code('/'.join(path.rstrip('/').split('/')[-2:]))}"


def _evaluation(config: Config, evaluations: list[dict[str, Any]]) -> str:
    """Returns a table of the last evaluation, and of the best one where that is another."""
    if not evaluations or not _metrics(evaluations[-1]):
        return "The run has no evaluation of these parameters."
    last, metric = evaluations[-1], config.train.keep_best or QUALITY
    best = max(evaluations, key=lambda line: (sort_key(metric, line), line["step"]))
    shown = [last] if best is last or math.isinf(sort_key(metric, best)) else [last, best]
    names = ["last"] if shown == [last] else ["last", f"best by {_plain(metric)}"]
    header = ["", *(f"{name}, step {line['step']:,}" for name, line in zip(names, shown)), ""]
    columns = [_metrics(line) for line in shown]
    rows = [
        (
            _code(key),
            *(f"{column[key]:.4f}" if key in column else "" for column in columns),
            _DESCRIPTIONS.get(key, ""),
        )
        for key in columns[0]
    ]
    return f"On validation examples of {_code(config.data.mixture)}:\n\n" + _table(header, rows)


def _metrics(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics of an evaluation without those of routers and the losses by source."""
    left_out = re.compile(r"router/.*|.+/(cross_entropy|neg_log_perplexity)|step|split|time")
    return {
        key: value
        for key, value in evaluation.items()
        if value is not None and not left_out.fullmatch(key)
    }


def _table(header: Any, rows: Any) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """Returns a text of one line that Markdown does not format."""
    return re.sub(r"([\\`*_<>\[\]|#])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """Returns a text as code in a cell of a table."""
    return f"`{' '.join(text.split()).replace('`', chr(39)).replace('|', chr(92) + '|')}`"
