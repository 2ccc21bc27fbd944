"""The walk-through's code runs."""

import re
from pathlib import Path

import pandas as pd

PAGE = Path(__file__).parents[2] / "docs" / "analysis.md"


def test_the_walk_through_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 7
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), scope)
    assert "Pareto front" in capsys.readouterr().out
    judged = scope["judged"].to_frame()
    assert isinstance(judged, pd.DataFrame)
    assert judged.loc[judged["claim"] == 7, "verdict"].item() == "supported"
