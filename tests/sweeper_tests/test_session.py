import os
import socket

import pytest

from db.errors import LaunchError
from sweeper import session
from sweeper.session import _node, _silent_stderr, ray_session


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """ray_session sets variables for Ray; none outlives a test."""
    monkeypatch.setattr(os, "environ", os.environ.copy())


def connect(address):
    with ray_session(address):
        pytest.fail("nothing listens there")


def test_address_without_a_port_is_refused(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 32)
    with pytest.raises(LaunchError, match=r"--address 'head' must be the HOST:PORT"):
        connect("head")


def test_nothing_listens_at_the_address(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 32)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(LaunchError, match=rf"no Ray cluster can be reached at '127.0.0.1:{port}'"):
        connect(f"127.0.0.1:{port}")


def test_a_driver_needs_a_ray_node_beside_it(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 32)
    monkeypatch.setattr(session, "_has_local_node", lambda: False)
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        head.listen()
        address = f"127.0.0.1:{head.getsockname()[1]}"
        with pytest.raises(LaunchError, match=rf"'ray start --address={address} --num-cpus=0'"):
            connect(address)


def test_a_token_is_asked_for_before_anything_is_tried(monkeypatch):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(LaunchError, match="no token for the Ray cluster at 'head:6379'"):
        connect("head:6379")


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        ("Version mismatch: the cluster runs Ray 2.59.0", "runs other versions than this driver"),
        ("Failed to connect to Ray cluster", "RAY_AUTH_TOKEN is the token of its nodes"),
    ],
)
def test_what_ray_says_becomes_one_line(monkeypatch, tmp_path, raised, said):
    class Ray:
        def init(self, **_):
            raise RuntimeError(raised)

    monkeypatch.setattr(session, "_require_answer", lambda address: None)
    with pytest.raises(LaunchError, match=said):
        session._connect(Ray(), "head:6379", tmp_path, None, None)


def test_noise_of_other_languages_stays_off_the_terminal(capfd):
    with _silent_stderr():
        os.write(2, b"rpc_client.h: Failed to connect\n")
    os.write(2, b"heard again\n")
    assert capfd.readouterr().err == "heard again\n"


def test_a_node_as_ray_counts_it():
    resources = {
        "CPU": 8.0,
        "GPU": 2.0,
        "accelerator_type:A100": 1.0,
        "accelerator_type:A100-80G": 1,
    }
    found = _node({"Resources": resources, "NodeID": "ab"})
    assert (found.cpus, found.gpus, found.accelerator) == (8.0, 2.0, "A100-80G")
    assert _node({"Resources": {}, "NodeID": "ab"}).accelerator is None
