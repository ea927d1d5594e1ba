"""Config files that fail: a sentence that names file and line."""

import pytest

from switch_jax.config import load_config
from switch_jax.errors import UserError
from switch_jax.sweeps.spec import load_sweep

START = "from switch_jax.config import defaults\n"
RUN = "from switch_jax.sweeps.spec import Curves, Sweep, SweepRun, Table\nR = SweepRun('f.py')\n"


@pytest.mark.parametrize(
    "text, words",
    [
        ("x = 1\ny = x.z\n", ["fails in line 2", "AttributeError: 'int' object has no attribute"]),
        ("def get_config(arg)\n  pass\n", ["fails in line 1", "SyntaxError"]),
        ("x = 1\n  y = 2\n", ["fails in line 2", "IndentationError"]),
        ("import switch_jax_nowhere\n", ["fails in line 1", "ModuleNotFoundError"]),
        ("import sys\nsys.exit(3)\n", ["fails in line 2", "SystemExit: 3"]),
        ("\n\ndef get_config(arg):\n  raise BaseException\n", ["fails in line 4"]),
        ("def get_config(arg):\n  raise OSError('a\\nb')\n", ["in line 2 (OSError: a b)"]),
        ("def get_config(arg):\n  return get_config(arg)\n", ["in line 2", "RecursionError"]),
        ("def get_config():\n  pass\n", ["fails (TypeError", "takes 0 positional arguments"]),
        ("get_config = 3\n", ["must define get_config(arg='')"]),
        ("x = '\0'\n", ["fails", "null bytes"]),
        ("", ["must define get_config(arg='')"]),
        ("def get_config(arg):\n  pass\n", ["must return the ConfigDict", "not a NoneType"]),
        (
            START + "def get_config(arg):\n  yield defaults()\n",
            ["must return the ConfigDict", "not a generator"],
        ),
        (
            START + "def get_config(arg):\n  c = defaults()\n  c.model = [1]\n  return c\n",
            ["model must be a group of keys, not [1]"],
        ),
        (
            START + "def get_config(arg):\n  c = defaults()\n  c.mode = 1\n  return c\n",
            ["Config has no key 'mode'; did you mean 'model'?"],
        ),
        (
            START + "def get_config(arg):\n  c = defaults()\n  c.data.seed = 1j\n  return c\n",
            ["data.seed must be a whole number, not 1j"],
        ),
        (
            START + "from ml_collections.config_dict import required_placeholder\n"
            "def get_config(arg):\n  c = defaults()\n"
            "  c.train.steps = required_placeholder(int)\n  return c\n",
            ["has a placeholder without a value"],
        ),
    ],
)
def test_a_config_file_that_fails_is_named_with_its_line(text, words, tmp_path):
    file = tmp_path / "f.py"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(f"{file}:")
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and message.endswith((".", "?"))


def test_a_config_that_is_not_utf8_fails_with_its_name(tmp_path):
    (tmp_path / "f.py").write_bytes(b"x = '\xff'\n")
    with pytest.raises(UserError, match=r"f\.py' fails .*SyntaxError"):
        load_config(str(tmp_path / "f.py"))


@pytest.mark.parametrize(
    "sweep, words",
    [
        ("3", "must return a switch_jax.sweeps.Sweep, not a int"),
        ("1 / 0", "fails in line 4 (ZeroDivisionError"),
        ("Sweep('t', [R])", "sweep.runs must be a dict, not"),
        ("Sweep('t', {'a': 'f.py'})", "sweep.runs.a must be a group of keys, not 'f.py'"),
        ("Sweep('t', {1: R})", "a name in sweep.runs must be a text, not 1"),
        ("Sweep('t', {'a': SweepRun(3)})", "sweep.runs.a.config must be a text, not 3"),
        ("Sweep('t', {'a': SweepRun('f', [])})", "sweep.runs.a.overrides must be a dict, not []"),
        ("Sweep('t', {'a': R}, seeds=(0.5,))", "sweep.seeds[0] must be a whole number, not 0.5"),
        ("Sweep('t', {'a': R}, seeds=())", "no seeds"),
        ("Sweep('t', {'a': R}, seeds=(1, 1))", "there twice"),
        ("Sweep('t', {})", "no runs"),
        ("Sweep('t', {'..': R})", "Run '..' of the sweep must be letters"),
        ("Sweep('t', {'a': R}, tables={'x/y': Table('t', 'c', {'l': 'a'})})", "Table 'x/y'"),
        ("Sweep('t', {'a': R}, tables={'x': Table('t', 'c', {})})", "Table 'x' of the sweep has"),
        ("Sweep('t', {'a': R}, figures={'x': Curves('t', 'c', {})})", "Figure 'x' of the sweep"),
        (
            "Sweep('t', {'a': R}, figures={'x': Curves('t', 'c', {'l': 'a'}, x='hours')})",
            "sweep.figures.x.x must be one of steps, seconds, not 'hours'",
        ),
        ("Sweep('t', {'a': R}, figures={'x': R})", "sweep.figures.x must be a Curves or a Scaling"),
    ],
)
def test_a_sweep_of_other_types_is_refused(sweep, words, tmp_path):
    file = tmp_path / "f.py"
    file.write_text(f"{RUN}def get_sweep(arg):\n  return {sweep}\n")
    with pytest.raises(UserError) as error:
        load_sweep(str(file))
    assert words in str(error.value), error.value


def test_a_file_may_have_a_colon_in_its_name(tmp_path):
    file = tmp_path / "a:b=c.py"
    file.write_text(
        "from switch_jax.config import defaults, parse_arg\n"
        "def get_config(arg):\n"
        "  c = defaults()\n"
        "  c.train.steps = parse_arg(arg, n=3).n\n"
        "  return c\n"
    )
    assert load_config(str(file)).train.steps == 3
    assert load_config(f"{file}:n=5").train.steps == 5
