"""`switch-jax generate`: what it refuses before a model is loaded, and files that are continued."""

import json
import shutil
import signal
import time

import pytest

from switch_jax.cli.main import main
from switch_jax.inference.answers import WINDOW
from tests.support import goldens, runs


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with files of texts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a ___\n")
    (tmp_path / "latin1.txt").write_bytes("a café\n".encode("latin-1"))
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text":\n')
    return tmp_path


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--text a --beam_size 2 --temperature 1", "beam_size=2"),
        ("--text a --num_answers 2", "2 results are more than beam_size=1 has; make beam_size"),
        ("--text a --num_answers 0", "0 is not at least 1"),
        ("--text caf\udce9", "--text is not UTF-8"),
        ("--text a --prefix caf\udce9", "--prefix is not UTF-8"),
        ("--text a --input a.txt", "not allowed with"),
        ("--input no.txt", "'no.txt' cannot be read"),
        ("--input .", "cannot be read"),
        ("--input latin1.txt", "latin1.txt is not UTF-8"),
        ("--input broken.jsonl", "broken.jsonl, line 2 is not JSON"),
        ("--input a.txt --output a.txt", "a.txt exists; name a file that does not"),
        ("--input a.txt --output .", ". exists; name a file that does not"),
        ("--input a.txt --output no/out.jsonl", "the folder of no/out.jsonl does not exist"),
    ],
)
def test_wrong_arguments_are_refused_before_loading(folder, capsys, arguments, words):
    assert main(["generate", "--workdir", str(folder), *arguments.split(" ")]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_a_killed_command_continues_and_writes_the_same_bytes(tmp_path):
    shutil.copytree(goldens.WORKDIR / "run", tmp_path / "run")
    texts = [{"id": i, "inputs": f"def f{i}(x): return x + {i}"} for i in range(4 * WINDOW)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(t) + "\n" for t in texts))
    command = ("generate", "--workdir", "run", "--input", "in.jsonl", "--no-fill_blanks")
    command += ("--max_length", "12", "--prefix", "import", "--temperature", "1", "--num_answers=2")
    out, _ = runs.run(*command, "--output", "whole.jsonl", cwd=tmp_path)
    assert out == f"whole.jsonl: {len(texts)} answered\n"
    whole = (tmp_path / "whole.jsonl").read_bytes()
    for text, line in zip(texts, whole.splitlines(), strict=True):
        answers = json.loads(line)
        assert {name: answers[name] for name in text} == text
        assert [a["text"].startswith("import") for a in answers["answers"]] == [True] * 2
        assert all(a.keys() == {"text", "score", "ended"} for a in answers["answers"])

    process = runs.start(*command, "--output", "out.jsonl", cwd=tmp_path)
    partial = tmp_path / "out.jsonl.partial" / "out.jsonl"
    while not partial.exists() or not partial.stat().st_size:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out.jsonl").exists()
    _, err = runs.run(*command, "--output", "out.jsonl", "--seed", "1", code=2, cwd=tmp_path)
    assert "out.jsonl.partial was made with another value of seed;" in err
    _, err = runs.run(*command, "--output", "out.jsonl", cwd=tmp_path)
    assert err.startswith("Continued behind ")
    assert (tmp_path / "out.jsonl").read_bytes() == whole and not partial.parent.exists()
    _, err = runs.run(*command, "--output", "out.jsonl", code=2, cwd=tmp_path)
    assert "out.jsonl exists; name a file that does not, or remove it" in err
