"""Training steps of other libraries, run by an interpreter of its own on batches of ours.

`python _peer_process.py FOLDER` reads `job.json`, `batches.npz` and `weights.npz` from the folder,
says what it could load, then answers each line of its standard input with one line of JSON: `loss`
with the training loss of the first batch without dropout, `step N` with the seconds of one
training step on batch N.
"""

import importlib
import json
import os
import sys
import time
import warnings
from pathlib import Path

import numpy as np

warnings.filterwarnings("ignore")

import torch  # noqa: E402

PEERS = {
    "replay sasrec": ("_replay", "SasRecModule"),
    "replay sasrec_network": ("_replay", "SasRecNetwork"),
    "replay bert4rec": ("_replay", "Bert4RecModule"),
    "rectools sasrec": ("_rectools", "SasRec"),
    "rectools bert4rec": ("_rectools", "Bert4Rec"),
    "recbole sasrec": ("_recbole", "SasRec"),
}


def main(folder):
    """Serve the commands of the parent until its end of the pipe closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(job["threads"])
    with np.load(folder / "batches.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    module, name = PEERS[job["peer"]]
    try:
        peer = getattr(importlib.import_module(module), name)(
            job, dict(np.load(folder / "weights.npz"))
        )
    except ModuleNotFoundError as error:
        print(json.dumps({"missing": str(error)}), file=answers, flush=True)
        return
    peer.module.to(job["device"])
    batches = [
        peer.batch({k: v[i].to(job["device"]) for k, v in arrays.items()})
        for i in range(job["num_batches"])
    ]
    optimizer = torch.optim.Adam(peer.module.parameters(), lr=1e-3, betas=(0.9, 0.98), fused=True)
    peer.module.train()
    targets = [peer.num_targets(batch) for batch in batches]
    print(json.dumps({"targets": targets}), file=answers, flush=True)
    for line in sys.stdin:
        command, *words = line.split()
        if command == "loss":
            peer.module.eval()
            with torch.no_grad():
                answer = {"loss": peer.loss(batches[0]).item()}
            peer.module.train()
        else:
            answer = step(peer, batches[int(words[0])], optimizer, job["device"])
        print(json.dumps(answer), file=answers, flush=True)


def step(peer, batch, optimizer, device):
    """Wall and processor seconds of forward, backward and optimizer."""
    synchronise(device)
    wall, cpu = time.perf_counter(), time.process_time()
    peer.loss(batch).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    synchronise(device)
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def synchronise(device):
    """Wait for a GPU."""
    if device != "cpu":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
