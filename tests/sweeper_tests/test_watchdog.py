import threading

from sweeper import watchdog
from sweeper.plan import STALLED, TIME_LIMIT
from sweeper.watchdog import EXIT_CODE, Watchdog


class Attempt:
    """What a watchdog did to an attempt."""

    def __init__(self, **limits):
        self.calls, self.left = [], threading.Event()
        self.dog = Watchdog(
            lambda *words: self.calls.append(words),
            **{"stall_seconds": None, "limit_seconds": None, **limits},
            leave=self.leave,
        )

    def leave(self, code):
        self.calls.append(code)
        self.left.set()


def test_silent_training_is_written_down_and_left():
    attempt = Attempt(stall_seconds=0.05)
    with attempt.dog:
        assert attempt.left.wait(20)
    (kind, message), code = attempt.calls
    assert kind == STALLED
    assert "reported nothing for stall_seconds=0.05" in message
    assert code == EXIT_CODE


def test_time_limit_reaches_a_step_that_does_not_end(monkeypatch):
    monkeypatch.setattr(watchdog, "_GRACE_SECONDS", 0.0)
    monkeypatch.setattr(watchdog, "_LOOK_SECONDS", 0.01)
    attempt = Attempt(limit_seconds=0.02)
    with attempt.dog:
        assert attempt.left.wait(20)
    assert attempt.calls[0][0] == TIME_LIMIT
    assert "took longer than time_limit_seconds=0.02" in attempt.calls[0][1]


def test_a_process_that_cannot_write_its_end_leaves_all_the_same():
    def fail(*words):
        raise OSError("the disk is full")

    left = threading.Event()
    dog = Watchdog(fail, stall_seconds=0.02, limit_seconds=None, leave=lambda code: left.set())
    with dog:
        assert left.wait(20)


def test_progress_starts_the_time_anew():
    dog = Attempt(stall_seconds=60).dog
    dog._seen -= 61
    assert dog._trouble() is not None
    dog.progress()
    assert dog._trouble() is None


def test_training_that_ends_is_left_alone():
    attempt = Attempt(stall_seconds=60)
    with attempt.dog:
        pass
    attempt.dog._thread.join(20)
    assert attempt.calls == []
