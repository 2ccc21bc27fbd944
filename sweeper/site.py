"""What a launch may use: the devices of this machine or of a cluster, and what is known of them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from db import query
from db.errors import LaunchError
from db.schema import spec_from_values
from sweeper.agenda import DeviceGroup, Site
from sweeper.cluster import NodeReport
from sweeper.device import gpu_classes, host_memory_bytes
from sweeper.forecast import Measured
from sweeper.memory_model import Shape
from sweeper.session import Node

_MAX_EVIDENCE = 5000
_EVIDENCE = """
    select r.*, d.fingerprint, m.peak_train_memory_bytes as peak,
      m.peak_eval_memory_bytes as eval_peak
    from run_summary m join runs r on r.id = m.run_id join datasets d on d.id = r.dataset_id
    where m.status = 'done' and m.memory_source = 'cuda_allocated'
      and m.peak_train_memory_bytes > 0 and d.fingerprint in ({})
    order by m.finished_at desc limit {}
"""


def local_site(cpus: float, gpus: float) -> Site:
    """Devices of this machine.

    Parameters
    ----------
    cpus, gpus : float
        What a local Ray may use.
    """
    if not gpus:
        return Site(cpus, cpus, host_memory_bytes=host_memory_bytes())
    classes = gpu_classes()
    if len(classes) < gpus:
        raise LaunchError(
            f"{gpus:g} GPUs are asked for but torch finds {len(classes)}; lower --gpus, or look "
            "with 'srsweep cluster check'"
        )
    # Ray cannot choose among the GPUs of one machine, so the smallest counts
    name, memory = min(classes[: int(gpus)], key=lambda item: item[1])
    return Site(cpus, cpus, (DeviceGroup(int(gpus), name, memory),), host_memory_bytes())


def cluster_site(nodes: Sequence[Node], reports: Mapping[str, NodeReport]) -> Site:
    """Devices of a cluster, its GPUs grouped by kind.

    Parameters
    ----------
    nodes : sequence of Node
        As Ray counts them.
    reports : mapping of str to NodeReport
        What each node said, by Ray's id of it.
    """
    groups: dict[str | None, DeviceGroup] = {}
    for node in nodes:
        if not node.gpus:
            continue
        report = reports.get(node.node_id)
        name, memory = (report.device, report.gpu_memory_bytes) if report else (None, None)
        old = groups.get(node.accelerator)
        count = int(node.gpus) + (old.num_gpus if old else 0)
        if old and old.memory_bytes is not None and (memory or 0) > old.memory_bytes:
            name, memory = old.device_class, old.memory_bytes
        groups[node.accelerator] = DeviceGroup(count, name, memory, node.accelerator)
    found = sorted(groups.values(), key=lambda group: group.memory_bytes or 0)
    if len(found) == 1:
        found = [DeviceGroup(found[0].num_gpus, found[0].device_class, found[0].memory_bytes)]
    largest = max(nodes, key=lambda node: (node.gpus, node.cpus))
    return Site(sum(node.cpus for node in nodes), largest.cpus, tuple(found))


def shapes_of(datasets: Mapping[str, Any]) -> dict[str, Shape]:
    """Sizes that memory depends on, of each prepared dataset by name."""
    return {
        name: Shape.from_quantiles(
            dataset.num_items, dataset.meta["train_sequence_length"]["quantiles"]
        )
        for name, dataset in datasets.items()
    }


def measured_runs(database: str, fingerprints: Mapping[str, str]) -> list[Measured]:
    """Finished GPU runs on the same data, of any sweep, the newest first.

    Parameters
    ----------
    database : str
        Run database.
    fingerprints : mapping of str to str
        Fingerprint of each dataset by name.
    """
    names = {f"f{n}": text for n, text in enumerate(sorted(set(fingerprints.values())))}
    sql = _EVIDENCE.format(", ".join(f":{name}" for name in names), _MAX_EVIDENCE)
    here = {fingerprint: name for name, fingerprint in fingerprints.items()}
    return [
        Measured(
            dataclasses.replace(spec_from_values(row), dataset=here[row["fingerprint"]]),
            float(max(row["peak"], row["eval_peak"] or 0)),
        )
        for row in query.rows(database, sql, names)
    ]
