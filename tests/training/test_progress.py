"""Progress display: what it shows of names and messages."""

import pytest

from switch_jax.training.progress import ProgressDisplay


@pytest.mark.parametrize("terminal", [False, True])
def test_names_and_messages_are_shown_as_they_are(terminal, monkeypatch, capsys):
    """Also if they look like rich's markup, and with control characters escaped."""
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLUMNS", "200")
    with ProgressDisplay(2.0) as display:
        display.print_line("failed: [/x] [red]a :smile: b\x1b[2J")
        display.update(1.0, "run [/y]", "[bold]task :smile: 7", line=True)
    text = capsys.readouterr().err
    assert r"failed: [/x] [red]a :smile: b\x1b[2J" in text
    assert "run [/y]" in text and "[bold]task :smile: 7" in text
