"""RecBole's SASRec, for `_peer_process.py`.

It learns one target per row, a user's last item: of each sequence of a batch this is one row of
the several that RecBole makes of a user. Its norms follow the additions (ours come before them);
width, activation and dropout of its blocks are set to ours.
"""

import torch
from recbole.model.sequential_recommender.sasrec import SASRec


class SasRec:
    """`recbole.model.sequential_recommender.SASRec` with cross-entropy."""

    def __init__(self, job, _):
        config = {
            "USER_ID_FIELD": "user",
            "ITEM_ID_FIELD": "item",
            "LIST_SUFFIX": "_list",
            "ITEM_LIST_LENGTH_FIELD": "length",
            "NEG_PREFIX": "neg_",
            "MAX_ITEM_LIST_LENGTH": job["max_seq_len"],
            "device": job["device"],
            "n_layers": job["num_blocks"],
            "n_heads": job["num_heads"],
            "hidden_size": job["embedding_dim"],
            "inner_size": job["embedding_dim"],
            "hidden_dropout_prob": job["dropout_rate"],
            "attn_dropout_prob": job["dropout_rate"],
            "hidden_act": "relu",
            "layer_norm_eps": 1e-12,
            "initializer_range": 0.02,
            "loss_type": "CE",
        }
        # importing RecBole's sequential models turns this on for the whole process
        torch.autograd.set_detect_anomaly(False)
        self.module = SASRec(config, _Items(job["num_items"] + 1))

    def batch(self, arrays):
        mask = arrays["mask"]
        lengths = mask.sum(1)
        columns = torch.arange(mask.shape[1], device=mask.device)
        # padding on the right, as RecBole lays sequences out
        shifted = (columns + mask.shape[1] - lengths[:, None]) % mask.shape[1]
        items = (arrays["items"] + 1) * mask
        return {
            "item_list": items.gather(1, shifted),
            "length": lengths,
            "item": arrays["targets"][:, -1] + 1,
        }

    def num_targets(self, batch):
        return len(batch["item"])

    def loss(self, batch):
        return self.module.calculate_loss(batch)


class _Items:
    """What the model asks of a dataset: how many items it has, padding included."""

    def __init__(self, count):
        self._count = count

    def num(self, _):
        return self._count
