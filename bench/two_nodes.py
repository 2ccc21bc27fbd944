"""`python -m bench two_nodes`: docs/cluster.md carried out to the letter on two nodes.

The nodes are two sets of namespaces of this machine: each has its own mounts (its own /tmp, /data
and home), its own host name and its own network address, so that nothing is shared by accident.
The commands are cut out of docs/cluster.md; only HEAD_IP, the database host and the token are
filled in. Then the other node loses its dataset and gets it by --send-datasets, and at last it dies
with everything on it in mid-sweep. Needs root, and the commands unshare, nsenter and ip.
"""

import argparse
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.postgres import USER, PostgresServer, temporary_server
from db import query

ROOT = Path(__file__).parent.parent
HEAD_IP, OTHER_IP = "10.77.0.1", "10.77.0.2"
GRID = """
dataset: movietweetings
loss: ce_minus
embedding_dim: 16
max_seq_len: 16
max_epochs: 1
num_negatives: [8, 64]
batch_size: [128, 512]
"""

SENT = GRID + "seed: 7\n"
LOST = GRID.replace("max_epochs: 1", "max_epochs: 4") + "seed: [1, 2]\n"
SILENCE = "--lease-seconds 5"


class Node:
    """Namespaces that a process of ours holds open.

    Parameters
    ----------
    name : str
        Host name in there.
    environment : dict of str to str
        Of every command.
    network : str, optional
        Name of its network namespace; this machine's own without.
    """

    def __init__(self, name: str, environment: dict[str, str], network: str | None = None) -> None:
        self.name = name
        self._environment = environment
        enter = ["ip", "netns", "exec", network] if network else []
        self._holder = subprocess.Popen(
            [*enter, "unshare", "--mount", "--uts", "sleep", "infinity"], stdin=subprocess.DEVNULL
        )
        comm = Path(f"/proc/{self._holder.pid}/comm")
        while comm.read_text().strip() != "sleep":  # what comes before it is not in there yet
            if self._holder.poll() is not None:
                raise RuntimeError(f"no namespaces for node {name}; this needs root")
            time.sleep(0.02)
        self.run(
            f"hostname {name} && mount -t tmpfs node /tmp && mount -t tmpfs node /data "
            "&& mkdir /tmp/home"
        )

    def run(self, command: str, *, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """Run a command line in there."""
        done = subprocess.run(
            ["nsenter", "--target", str(self._holder.pid), "--mount", "--uts", "--net",
             "bash", "-c", command],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
        )  # fmt: skip
        if check and done.returncode:
            raise RuntimeError(f"{self.name}: {command}: {done.stdout[-900:]}{done.stderr[-900:]}")
        return done

    def start(self, command: str) -> "subprocess.Popen[bytes]":
        """Start a command line in there that goes on."""
        return subprocess.Popen(
            ["nsenter", "--target", str(self._holder.pid), "--mount", "--uts", "--net",
             "bash", "-c", command],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def close(self) -> None:
        """End every process in there, each by its id."""
        if self._holder.poll() is not None:
            return  # closed before; its process id may be another's by now
        mine = self._space(self._holder.pid)
        for path in Path("/proc").glob("[0-9]*"):
            pid = int(path.name)
            if pid != self._holder.pid and mine is not None and self._space(pid) == mine:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._holder.kill()
        self._holder.wait()

    @staticmethod
    def _space(pid: int) -> str | None:
        try:
            return os.readlink(f"/proc/{pid}/ns/mnt")
        except OSError:
            return None


def documented(heading: str) -> list[str]:
    """Commands under a heading of docs/cluster.md, one a line."""
    text = (ROOT / "docs" / "cluster.md").read_text()
    section = text.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    blocks = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


def _own_address() -> str:
    """Address by which this machine would be known outside."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing
        return str(probe.getsockname()[0])


@contextlib.contextmanager
def network(name: str) -> Iterator[None]:
    """A network namespace with a cable to this machine."""
    for words in (
        f"netns add {name}",
        f"link add {name}-a type veth peer name {name}-b netns {name}",
        f"addr add {HEAD_IP}/24 dev {name}-a",
        f"link set {name}-a up",
        f"-n {name} addr add {OTHER_IP}/24 dev {name}-b",
        f"-n {name} link set {name}-b up",
        f"-n {name} link set lo up",
        f"-n {name} route add {_own_address()}/32 via {HEAD_IP}",  # Ray's choice on the head
    ):
        subprocess.run(["ip", *words.split()], check=True)
    try:
        yield
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=False)


@contextlib.contextmanager
def reachable_server(port: int | None = None) -> Iterator[PostgresServer]:
    """A PostgreSQL server that both nodes reach."""
    settings = {"listen_addresses": f"127.0.0.1,{HEAD_IP}"}
    with temporary_server(settings=settings) as server:
        if port is not None:
            server.stop()
            server.port = port
            server.start()
        with (server._data / "pg_hba.conf").open("a") as file:
            file.write(f"host all all {HEAD_IP}/24 scram-sha-256\n")
        assert server.pid is not None
        os.kill(server.pid, signal.SIGHUP)
        yield server


def environment(server: PostgresServer) -> dict[str, str]:
    """What docs/cluster.md exports on every machine, with its blanks filled in."""
    found = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": "/tmp/home",
        "PGPASSWORD": server.password,
        "OMP_NUM_THREADS": "1",
    }
    for line in documented("What every machine needs"):
        name, _, value = line.removeprefix("export ").partition("=")
        found[name] = value
    found["RAY_AUTH_TOKEN"] = secrets.token_hex(16)
    found["SRSWEEP_DB"] = f"postgresql://{USER}@{HEAD_IP}:{server.port}/postgres"
    return found


def prepare(folder: Path) -> None:
    """The dataset that the documented grid names; generated where the real one is not at hand."""
    shared = os.environ.get("SRSWEEP_SHARED")
    ratings = Path(shared or "") / "data" / "movietweetings-100k" / "ratings.dat"
    words = ["generate", "--users", "3000", "--items", "2000"]
    if ratings.exists():
        words = ["prepare", "--source", "movielens", "--input", str(ratings)]
    command = [str(Path(sys.executable).with_name("srsweep")), *words, "--out", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def carry_out(folder: Path) -> list[dict[str, object]]:
    """Start both nodes, check, launch, ask the database; one row per host.

    Parameters
    ----------
    folder : Path
        Outside /tmp, which each node has for itself.

    Raises
    ------
    RuntimeError
        A command of the page fails, or says what it should not.
    """
    start_head, start_other, check, launch = documented("Plain `ray start`")
    data = folder / "movietweetings"
    prepare(data)
    (folder / "grids").mkdir()
    for name, text in (("movietweetings", GRID), ("sent", SENT), ("lost", LOST)):
        (folder / "grids" / f"{name}.yaml").write_text(text)
    with network("srs2"), reachable_server() as server, contextlib.ExitStack() as stack:
        given = environment(server)
        head, other = Node("head", given), Node("other", given, "srs2")
        stack.callback(other.close)
        stack.callback(head.close)
        for node in (head, other):
            node.run(f"mkdir /data/prepared && cp -r {data} /data/prepared/")
        for node, command in ((head, start_head), (other, start_other)):
            print(f"{node.name}$ {command}", flush=True)
            node.run(command.replace("HEAD_IP", HEAD_IP))
        for command in (check, launch):
            print(f"head$ {command}", flush=True)
            done = head.run(f"cd {folder} && {command.replace('HEAD_IP', HEAD_IP)}")
            print(done.stdout, end="", flush=True)
        _expect(head, check, "problem", other, "rm -r /data/prepared/movietweetings")
        wrong = check.replace("srsweep", f"RAY_AUTH_TOKEN={secrets.token_hex(16)} srsweep", 1)
        _expect(head, wrong, "RAY_AUTH_TOKEN", other, "true")
        again = f"cd {folder} && {launch.replace('HEAD_IP', HEAD_IP)} --send-datasets"
        print(f"head$ {launch} --send-datasets", flush=True)
        print(head.run(again.replace("movietweetings.yaml", "sent.yaml")).stdout, end="")
        print(f"other: {other.run('ls ~/.cache/srsweep/datasets').stdout.split()[0]}", flush=True)
        going = head.start(again.replace("movietweetings.yaml", f"lost.yaml {SILENCE}"))
        _wait_for_run_on(other.name, server.url())
        other.close()
        print("the other node is gone", flush=True)
        if going.wait(300):
            raise RuntimeError("the launch did not survive the loss of a node")
        return query.rows(
            server.url(),
            "select s.name as sweep, a.host, a.status, count(*) as attempts, "
            "count(distinct r.id) as runs, min(r.status) as first, max(r.status) as last "
            "from attempts a join runs r on r.id = a.run_id "
            "join sweep_runs l on l.run_id = r.id join sweeps s on s.id = l.sweep_id "
            "group by s.name, a.host, a.status order by s.name, a.host, a.status",
        )


def _wait_for_run_on(host: str, url: str) -> None:
    """Wait until a run is under way on a node."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        rows = query.rows(url, "select host, last_step from attempts where status = 'running'")
        if any(row["host"] == host and row["last_step"] is not None for row in rows):
            return
        time.sleep(0.2)
    raise RuntimeError(f"no run began on {host}")


def _expect(head: Node, command: str, text: str, other: Node, damage: str) -> None:
    """Spoil something on the other node, and see the command name it."""
    other.run(damage)
    done = head.run(command.replace("HEAD_IP", HEAD_IP), check=False)
    said = [line for line in done.stderr.splitlines() if text in line]
    if not done.returncode or not said:
        raise RuntimeError(f"{command} did not name {text!r}: {done.stdout}{done.stderr}")
    print(f"after '{damage}': {said[0]}", flush=True)


def main(words: list[str]) -> int:
    argparse.ArgumentParser(prog="python -m bench two_nodes", description=__doc__).parse_args(words)
    if os.geteuid() != 0:
        print("bench two_nodes makes namespaces and needs root", file=sys.stderr)
        return 1
    made = not Path("/data").exists()
    Path("/data").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="two-nodes-", dir="/var/tmp"))
    try:
        rows = carry_out(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if made:
            Path("/data").rmdir()
    for row in rows:
        print(json.dumps(row))
    done = {name: 0 for name in ("movietweetings", "sent", "lost")}
    for row in rows:
        done[str(row["sweep"])] += int(str(row["runs"])) * (row["status"] == "done")
    if list(done.values()) != [4, 4, 8] or any(
        row["first"] != "done" or row["last"] != "done" for row in rows
    ):
        print("not every run is done exactly once", file=sys.stderr)
        return 1
    if not any(row["sweep"] == "lost" and row["status"] == "lost" for row in rows):
        print("no run was lost with the node", file=sys.stderr)
        return 1
    return 0
