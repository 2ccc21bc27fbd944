"""A bench that nobody runs rots: the tiniest shape of it."""

from bench import data


def test_bench_runs_at_a_tiny_shape(tmp_path, capsys):
    line = "--rows 3000 --users 200 --items 100 --rounds 1 --memory-rows 1000 100000"
    assert data.main([*line.split(), "--folder", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for step in ("generate", "read", "prepare 1,000 rows", "prepare 100,000 rows", "open"):
        assert step in printed
    assert not list(tmp_path.iterdir())
