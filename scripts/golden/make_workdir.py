"""Writes tests/golden/workdir: a small WORKDIR, the store it reads, and what comes of both.

    python scripts/golden/make_workdir.py

It holds `store/`, some of this repository's documentation as
`switch-jax data pack` packs it; `run/`, what `switch-jax train` writes in four steps of `tiny.py`,
but for TensorBoard's files; `expected.json`, logits, `switch-jax eval`, and the metrics that two
more steps log in a run that nothing interrupted. All commands run in the folder itself, and no
path of this machine is in it.

The WORKDIR that is there was written before what reads it: replace it only where WORKDIRs of its
day need not be read any more. With `--expected`, it stays and what comes of it is written anew.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import sentencepiece

import tests.conftest  # noqa: F401, before JAX
from switch_jax.data.token_store.manifest import MANIFEST, write_manifest
from tests.support import goldens, runs

DOCS = Path(__file__).parents[2] / "docs"
CONFIG = "tiny.py"


def texts() -> dict[str, list[str]]:
    """Sections of the documentation, by split."""
    pages = [(DOCS / f"{name}.md").read_text() for name in ("architecture", "data")]
    sections = [text for page in pages for text in page.split("\n## ")]
    return {"train": sections[:-2], "validation": sections[-2:]}


def make_vocabulary(lines: list[str], path: Path) -> None:
    """Trains one without Unicode's normalisation, whose rules take 200 KB."""
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=file,
            normalization_rule_name="identity",
            byte_fallback=True,
            vocab_size=500,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            num_threads=1,
            minloglevel=2,
        )


def make_run(folder: Path) -> None:
    """Writes `store` and `run` into a folder that has the config."""
    with tempfile.TemporaryDirectory() as temporary:
        of_text = Path(temporary)
        mixture = runs.write_text(of_text, **texts())
        lines = [line for text in texts()["train"] for line in text.splitlines() if line]
        make_vocabulary(lines, of_text / "vocabulary.model")
        data = [f"--config.data.mixture={mixture}", "--config.data.data_dir=None"]
        data.append(f"--config.data.vocabulary={of_text / 'vocabulary.model'}")
        pack = ("data", "pack", "--config", CONFIG, *data, "--output", "store", "--workers", 1)
        runs.run(*pack, cwd=folder)
    manifest = (folder / "store" / MANIFEST).read_text().replace(f"{of_text}/", "")
    write_manifest(folder / "store", json.loads(manifest))
    runs.run("train", "--config", CONFIG, "--workdir", "run", cwd=folder)
    shutil.rmtree(folder / "run" / "tensorboard")
    for path in folder.glob("run/**/commit_success.txt"):  # Orbax reads no more than its name
        path.write_text(path.read_text().replace(f"{folder}/", ""))


def make_expected(folder: Path) -> None:
    """Writes `expected.json` for the run in a folder."""
    expected = {
        "machine": goldens.machine(),
        "logits": goldens.logits(folder / "run"),
        "eval": goldens.evaluation(folder),
    }
    with tempfile.TemporaryDirectory() as temporary:
        workdir = Path(temporary) / "run"
        runs.run("train", "--config", CONFIG, goldens.MORE, "--workdir", workdir, cwd=folder)
        expected["train"] = goldens.later_metrics(workdir)
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def main() -> None:
    """Replaces what is there."""
    if "--expected" not in sys.argv[1:]:
        for name in ("store", "run"):
            shutil.rmtree(goldens.WORKDIR / name, ignore_errors=True)
        make_run(goldens.WORKDIR)
    make_expected(goldens.WORKDIR)


if __name__ == "__main__":
    main()
