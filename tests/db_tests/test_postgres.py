"""The throw-away server: gone with the process that started it, however that ends."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from bench.postgres import _born, remove_abandoned

OWNER = """
import time
from bench.postgres import temporary_server
with temporary_server() as server:
    print(server.pid, server._data.parent, flush=True)
    time.sleep(300)
"""


def _wait(condition, seconds=20.0):
    for _ in range(int(seconds / 0.05)):
        if condition():
            return True
        threading.Event().wait(0.05)
    return False


def test_a_killed_owner_leaves_neither_server_nor_folder():
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    pid, folder = owner.stdout.readline().split()
    assert _born(int(pid))
    assert Path(folder).is_dir()
    owner.kill()
    owner.communicate()
    assert _wait(lambda: not _born(int(pid)))
    assert _wait(lambda: not Path(folder).exists())


def _folder(place, name, owner):
    folder = place / f"srsweep-pg-{name}"
    (folder / "data").mkdir(parents=True)
    if owner is not None:
        (folder / "owner").write_text(owner)
    return folder


def test_what_dead_owners_left_is_removed_and_nothing_else(tmp_path):
    mine = f"{os.getpid()} {_born(os.getpid())}"
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    dead = _folder(tmp_path, "dead", f"{child.pid} 1")
    reused = _folder(tmp_path, "reused", f"{os.getpid()} 1")
    kept = [
        _folder(tmp_path, "living", mine),
        _folder(tmp_path, "unknown", None),
        _folder(tmp_path, "torn", "12"),
        tmp_path / "other",
    ]
    kept[-1].mkdir()
    assert sorted(remove_abandoned(tmp_path)) == sorted([dead, reused])
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_the_server_of_a_dead_owner_is_stopped_but_no_stranger(tmp_path):
    # a background shell starts its jobs with SIGQUIT ignored, and they would hand it on
    wait = (
        "import signal; signal.signal(signal.SIGQUIT, signal.SIG_DFL); "
        "print(flush=True); signal.pause()"
    )
    strangers, folders = [], []
    for name in ("ours", "stranger"):
        folder = _folder(tmp_path, name, "1 1")
        last = str(folder / "data") if name == "ours" else "elsewhere"
        process = subprocess.Popen([sys.executable, "-c", wait, last], stdout=subprocess.PIPE)
        process.stdout.readline()
        (folder / "data" / "postmaster.pid").write_text(f"{process.pid}\n")
        strangers.append(process)
        folders.append(folder)
    reaper = threading.Thread(target=strangers[0].wait)
    reaper.start()
    try:
        assert sorted(remove_abandoned(tmp_path)) == folders
        reaper.join(20)
        assert strangers[0].returncode == -signal.SIGQUIT
        assert strangers[1].poll() is None
    finally:
        for process in strangers:
            process.kill()
            process.communicate()
