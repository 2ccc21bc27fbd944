"""Killed runs resume to the same weights; `python -m bench resume` does so twenty times."""

import pytest

from bench import resume


def test_a_killed_run_ends_with_the_same_weights(capsys):
    assert resume.main(["--kills", "2", "--epochs", "3", "--users", "100"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "sasrec ce" in line]
    assert "bit for bit" in line
    assert " 2 " in line


def test_other_weights_are_no_figures(monkeypatch):
    found = iter([{"weights": "a"}, {"weights": "b"}])
    monkeypatch.setattr(resume, "_run", lambda *_: 0)
    monkeypatch.setattr(resume, "_read", lambda _: next(found))
    with pytest.raises(SystemExit, match="weights differ after 0 kills: no figures"):
        resume.main(["--kills", "1", "--epochs", "2", "--users", "100"])
