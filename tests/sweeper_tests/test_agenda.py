import pytest

from db.spec import RunSpec
from sweeper.agenda import Agenda, Candidate, DeviceGroup, Site
from sweeper.forecast import Measured, MemoryForecaster, gpu_share
from sweeper.grid import Resources
from sweeper.memory_model import Shape
from sweeper.plan import CONTEXT_BYTES

GIB = 2**30
SHAPES = {"d": Shape(1000, 20.0)}


def spec(**values):
    given = {"dataset": "d", "loss": "ce_minus", "num_negatives": 8, "precision": "fp32"}
    return RunSpec(**{**given, **values})


def candidate(key, cost=1.0, *, whole=False, **values):
    return Candidate(key, spec(**values), cost, whole)


def gpus(*groups):
    return Site(cpus=64.0, cpus_of_node=64.0, groups=tuple(groups))


def measured(**peaks):
    """A forecaster that has seen batch sizes with these peaks in GiB."""
    runs = [Measured(spec(batch_size=int(k[2:])), v * GIB) for k, v in peaks.items()]
    return MemoryForecaster(SHAPES, runs)


def taken(agenda):
    found = []
    while (task := agenda.next()) is not None:
        found.append(task)
    return found


def test_longest_come_first_and_room_is_taken_back():
    agenda = Agenda(Site(2.0, 2.0), Resources(), lookahead=0)
    agenda.offer([candidate("a", 1), candidate("b", 3), candidate("c", 2)])
    assert [task.key for task in taken(agenda)] == ["b", "c"]
    agenda.ended("c")
    assert [task.key for task in taken(agenda)] == ["a"]
    assert not agenda.is_idle


def test_reused_workers_find_a_run_waiting():
    agenda = Agenda(Site(2.0, 2.0), Resources())
    agenda.offer([candidate(str(n)) for n in range(9)])
    assert len(taken(agenda)) == 4


def test_most_runs_at_a_time():
    agenda = Agenda(Site(8.0, 8.0), Resources(), max_concurrent=3)
    agenda.offer([candidate(str(n)) for n in range(9)])
    assert len(taken(agenda)) == 3


def test_exclusive_runs_have_a_gpu_each_whatever_they_need():
    agenda = Agenda(gpus(DeviceGroup(2, "g", 80 * GIB)), Resources(gpus=1.0))
    agenda.learn(measured(bs32=1.0))
    agenda.offer([candidate(str(n), batch_size=32, seed=n) for n in range(5)])
    tasks = taken(agenda)
    assert [(task.slot.gpus, task.slot.timing) for task in tasks] == [(1.0, "exclusive")] * 2


def test_shared_runs_are_packed_by_predicted_memory():
    agenda = Agenda(gpus(DeviceGroup(1, "g", 80 * GIB)), Resources(gpus=1.0, timing="shared"))
    agenda.learn(measured(bs32=20.0))
    agenda.offer([candidate(str(n), batch_size=32, seed=n) for n in range(9)])
    tasks = taken(agenda)
    share = gpu_share(1.05 * 20 * GIB, 80 * GIB)
    assert share == pytest.approx(0.32)
    assert [task.slot.gpus for task in tasks] == [share] * 3
    assert {task.slot.timing for task in tasks} == {"shared"}
    assert not tasks[0].slot.decides


def test_a_whole_gpu_while_nothing_is_known():
    agenda = Agenda(gpus(DeviceGroup(2, "g", None)), Resources(gpus=1.0, timing="shared"))
    agenda.learn(measured())
    agenda.offer([candidate(str(n)) for n in range(5)])
    assert [task.slot.gpus for task in taken(agenda)] == [1.0, 1.0]


def test_what_did_not_fit_into_its_share_gets_a_whole_gpu_of_the_largest_kind():
    site = gpus(DeviceGroup(1, "small", 24 * GIB, "S"), DeviceGroup(1, "large", 80 * GIB, "L"))
    agenda = Agenda(site, Resources(gpus=1.0, timing="shared"))
    agenda.learn(measured(bs32=1.0))
    agenda.offer([candidate("a", batch_size=32, whole=True)])
    task = agenda.next()
    assert (task.slot.gpus, task.slot.accelerator, task.slot.decides) == (1.0, "L", True)


def test_small_runs_go_to_small_gpus_and_large_ones_to_large():
    site = gpus(DeviceGroup(1, "small", 24 * GIB, "S"), DeviceGroup(1, "large", 80 * GIB, "L"))
    agenda = Agenda(site, Resources(gpus=1.0))
    agenda.learn(measured(bs32=10.0, bs64=50.0))
    agenda.offer([candidate("small", 2, batch_size=32), candidate("large", 1, batch_size=64)])
    slots = {task.key: task.slot for task in taken(agenda)}
    assert slots["small"].accelerator == "S"
    assert slots["large"].accelerator == "L"
    assert not slots["small"].decides, "out of memory on the small one is no result yet"


def test_a_run_for_a_whole_gpu_is_not_kept_out_by_small_ones():
    agenda = Agenda(gpus(DeviceGroup(1, "g", 80 * GIB)), Resources(gpus=1.0, timing="shared"))
    agenda.learn(measured(bs32=20.0))
    small = [candidate(str(n), 1, batch_size=32, seed=n) for n in range(20)]
    agenda.offer(small)
    first = taken(agenda)
    agenda.offer([*small, candidate("whole", 9, whole=True)])
    agenda.ended(first[0].key)
    assert taken(agenda) == [], "the freed share is kept for the long run"
    for task in first[1:]:
        agenda.ended(task.key)
    assert [task.key for task in taken(agenda)] == ["whole"]


def test_of_runs_that_may_not_fit_the_smallest_is_tried_first():
    agenda = Agenda(gpus(DeviceGroup(4, "g", 10 * GIB)), Resources(gpus=1.0))
    agenda.learn(measured(bs64=20.0, bs128=40.0, bs256=80.0))
    sizes = {"a": 64, "b": 128, "c": 256}
    waiting = [candidate(k, cost=size, batch_size=size) for k, size in sizes.items()]
    agenda.offer([*waiting, candidate("fits", batch_size=1)])
    assert {task.key for task in taken(agenda)} == {"a", "fits"}
    mark = agenda.mark()
    agenda.ended("a")
    agenda.offer(waiting, mark)
    assert taken(agenda) == [], "what was read before the end decides nothing"
    agenda.offer(waiting[1:], agenda.mark())
    assert [task.key for task in taken(agenda)] == ["b"], "a did fit after all"


def test_runs_whose_worker_cannot_start_wait_for_the_next_round():
    agenda = Agenda(Site(1.0, 1.0), Resources())
    for _ in range(2):
        agenda.offer([candidate("a")], agenda.mark())
        assert agenda.next() is not None
        agenda.ended("a", started=False)
    agenda.offer([candidate("a")], agenda.mark())
    assert agenda.next() is None
    agenda.reopen()
    agenda.offer([candidate("a")], agenda.mark())
    assert agenda.next() is not None


def test_nothing_more_after_closing():
    agenda = Agenda(Site(1.0, 1.0), Resources())
    agenda.offer([candidate("a")])
    agenda.close()
    assert agenda.next() is None
    assert agenda.is_idle


def test_evidence_of_a_forecast():
    forecaster = measured(bs32=0.01, bs4096=40.0)
    repeat = forecaster.predict(spec(batch_size=32, seed=7))
    assert (repeat.evidence, repeat.upper) == ("repeat", pytest.approx(1.05 * 0.01 * GIB))
    larger = forecaster.predict(spec(batch_size=16))
    assert (larger.evidence, larger.upper) == ("larger", pytest.approx(1.05 * 0.01 * GIB))
    assert forecaster.predict(spec(batch_size=64, embedding_dim=512)).evidence == "formula"


def test_calibrated_on_enough_runs():
    shape = SHAPES["d"]
    runs = [
        Measured(spec(batch_size=size, max_seq_len=length), 1e8 + 5e4 * size * length)
        for size in (16, 32, 64, 128)
        for length in (10, 20, 40)
    ]
    found = MemoryForecaster({"d": shape}, runs).predict(spec(batch_size=48, max_seq_len=30))
    assert found.evidence in ("model", "larger")
    assert found.expected < found.upper < 20 * GIB


def test_share_of_a_gpu_leaves_room_for_the_context():
    assert gpu_share(0, 80 * GIB) == 0.01
    assert gpu_share(10 * GIB, 80 * GIB) == pytest.approx(
        0.01 * -(-100 * (CONTEXT_BYTES + 11.5 * GIB) // (80 * GIB))
    )
    assert gpu_share(70 * GIB, 80 * GIB) == 1.0
    assert gpu_share(900 * GIB, 80 * GIB) == 1.0
