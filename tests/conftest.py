"""Fixtures that every test folder may use."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of the reference data; skips where it is not there."""
    folder = os.environ.get("SRSWEEP_SHARED")
    if not folder:
        pytest.skip("SRSWEEP_SHARED is unset: the reference data is not on this machine")
    path = Path(folder)
    if not (path / "golden").is_dir():
        pytest.fail(f"SRSWEEP_SHARED={folder} holds no folder 'golden'")
    return path


@pytest.fixture
def cuda() -> str:
    """Name of the CUDA device; skips without one unless SRSWEEP_REQUIRE_GPU=1."""
    import torch

    if not torch.cuda.is_available():
        if os.environ.get("SRSWEEP_REQUIRE_GPU") == "1":
            pytest.fail("SRSWEEP_REQUIRE_GPU=1 but torch sees no CUDA device")
        pytest.skip("torch sees no CUDA device")
    return "cuda"


class Databases:
    """Makes one run database per test; the tables come from a template made once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server: Any = None
        self._exit = contextlib.ExitStack()
        self._server_url = os.environ.get("SRSWEEP_TEST_PG_URL", "")
        self._made: list[str] = []

    @property
    def server(self) -> Any:
        """The PostgreSQL server that these tests run; started at the first need."""
        if self._server is None:
            from bench.postgres import temporary_server

            self._server = self._exit.enter_context(temporary_server())
        return self._server

    def sqlite(self, *, empty: bool = False) -> str:
        """URL of a new SQLite file."""
        path = self._folder / f"{uuid.uuid4().hex}.db"
        template = self._folder / "template.db"
        if not empty:
            if not template.exists():
                _create_tables(f"sqlite:///{template}")
            shutil.copy(template, path)
        return f"sqlite:///{path}"

    def postgres(self, *, empty: bool = False) -> str:
        """URL of a new PostgreSQL database."""
        template = "template0"
        if not empty:
            template = f"srsweep_template_{os.getpid()}"
            if template not in self._made:
                self._make(template, "template0")
                _create_tables(self._url(template))
        return self._make(f"srsweep_{uuid.uuid4().hex[:16]}", template)

    def close(self) -> None:
        """Drop what was made on a server that is not ours, stop the one that is."""
        if self._server_url:
            self._execute(*(f'DROP DATABASE IF EXISTS "{name}"' for name in self._made))
        self._exit.close()

    def _make(self, name: str, template: str) -> str:
        self._execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        self._made.append(name)
        return self._url(name)

    def _url(self, database: str) -> str:
        from sqlalchemy.engine import make_url

        url = make_url(self._server_url or self.server.url()).set(database=database)
        return url.render_as_string(hide_password=False)

    def _execute(self, *statements: str) -> None:
        import psycopg

        url = self._server_url or self.server.url()
        with psycopg.connect(url, autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement)


def _create_tables(url: str) -> None:
    from db.store import RunStore

    RunStore.open(url)


@pytest.fixture(scope="session")
def databases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Databases]:
    """Maker of run databases; PostgreSQL comes from SRSWEEP_TEST_PG_URL or is started here."""
    made = Databases(tmp_path_factory.mktemp("databases"))
    yield made
    made.close()


@pytest.fixture(params=["sqlite", "postgres"])
def store_url(request: pytest.FixtureRequest, databases: Databases) -> str:
    """URL of a run database without runs, on SQLite and on PostgreSQL."""
    return databases.sqlite() if request.param == "sqlite" else databases.postgres()


@pytest.fixture(params=["sqlite", "postgres"])
def empty_url(request: pytest.FixtureRequest, databases: Databases) -> str:
    """URL of a database without tables, on SQLite and on PostgreSQL."""
    make = databases.sqlite if request.param == "sqlite" else databases.postgres
    return make(empty=True)
