"""replay-rec's models, for `_peer_process.py`."""

import numpy as np
import torch


def schema(job):
    """One sequence of item ids."""
    from replay.data import FeatureHint, FeatureSource, FeatureType
    from replay.data.nn import TensorFeatureInfo, TensorFeatureSource, TensorSchema

    return TensorSchema(
        TensorFeatureInfo(
            name="item_id",
            is_seq=True,
            feature_type=FeatureType.CATEGORICAL,
            cardinality=job["num_items"],
            padding_value=job["num_items"],
            embedding_dim=job["embedding_dim"],
            feature_hint=FeatureHint.ITEM_ID,
            feature_sources=[TensorFeatureSource(FeatureSource.INTERACTIONS, "item_id")],
        )
    )


LOSSES = {
    "ce": ("CE", False),
    "ce_minus": ("CE", True),
    "bce": ("BCE", True),
    "sce": ("SCE", False),
}


def sce_params(job):
    """Buckets as ours have for the first batch."""
    from replay.models.nn.loss import SCEParams

    num_buckets, size_x = job["sce_shape"]
    size_y = min(job["sce_bucket_size_y"], job["num_items"])
    return SCEParams(num_buckets, size_x, size_y, job["sce_mix"])


class SasRecModule:
    """`replay.models.nn.sequential.SasRec`, the one that the paper started from."""

    def __init__(self, job, weights):
        from replay.models.nn.sequential import SasRec

        kind, sampled = LOSSES[job["loss"]]
        self.module = SasRec(
            schema(job),
            block_count=job["num_blocks"],
            head_count=job["num_heads"],
            hidden_size=job["embedding_dim"],
            max_seq_len=job["max_seq_len"],
            dropout_rate=job["dropout_rate"],
            loss_type=kind,
            loss_sample_count=job["num_negatives"] if sampled else None,
            sce_params=sce_params(job) if kind == "SCE" else None,
        )
        if weights is not None:
            load(self.module._model, sasrec_names(weights))

    def batch(self, arrays):
        return {
            "feature_tensor": {"item_id": arrays["items"]},
            "padding_mask": arrays["mask"],
            "positive_labels": arrays["targets"],
            "target_padding_mask": arrays["mask"],
        }

    def num_targets(self, batch):
        return int(batch["target_padding_mask"].sum())

    def loss(self, batch):
        return self.module._compute_loss(batch)


class SasRecNetwork:
    """`replay.nn.sequential.SasRec`, its successor, with cross-entropy."""

    def __init__(self, job, _):
        from replay.nn.sequential import SasRec

        self.module = SasRec.from_params(
            schema(job),
            embedding_dim=job["embedding_dim"],
            num_heads=job["num_heads"],
            num_blocks=job["num_blocks"],
            max_sequence_length=job["max_seq_len"],
            dropout=job["dropout_rate"],
        )
        self.padding = job["num_items"]

    def batch(self, arrays):
        mask = arrays["mask"]
        return {
            "feature_tensors": {"item_id": arrays["items"].masked_fill(~mask, self.padding)},
            "padding_mask": mask,
            "positive_labels": arrays["targets"][..., None],
            "negative_labels": None,
            "target_padding_mask": mask[..., None],
        }

    def num_targets(self, batch):
        return int(batch["target_padding_mask"].sum())

    def loss(self, batch):
        return self.module.forward_train(**batch)["loss"]


class Bert4RecModule:
    """`replay.models.nn.sequential.Bert4Rec` with a tied head; `targets` marks what is masked."""

    def __init__(self, job, weights):
        from replay.models.nn.sequential import Bert4Rec

        kind, sampled = LOSSES[job["loss"]]
        self.module = Bert4Rec(
            schema(job),
            block_count=job["num_blocks"],
            head_count=job["num_heads"],
            hidden_size=job["embedding_dim"],
            max_seq_len=job["max_seq_len"],
            dropout_rate=job["dropout_rate"],
            loss_type=kind,
            loss_sample_count=job["num_negatives"] if sampled else None,
            enable_embedding_tying=True,
        )
        load(self.module._model, bert4rec_names(weights))

    def batch(self, arrays):
        return {
            "inputs": {"item_id": arrays["items"]},
            "pad_mask": arrays["mask"],
            "token_mask": ~arrays["masked"],
            "positive_labels": arrays["items"],
        }

    def num_targets(self, batch):
        return int((batch["pad_mask"] & ~batch["token_mask"]).sum())

    def loss(self, batch):
        return self.module._compute_loss(batch)


BLOCK_NAMES = {
    "attention_layers.{}.in_proj_weight": "blocks.{}.in_weight",
    "attention_layers.{}.in_proj_bias": "blocks.{}.in_bias",
    "attention_layers.{}.out_proj.weight": "blocks.{}.out.weight",
    "attention_layers.{}.out_proj.bias": "blocks.{}.out.bias",
    "attention_layernorms.{}.weight": "blocks.{}.attention_norm.weight",
    "attention_layernorms.{}.bias": "blocks.{}.attention_norm.bias",
    "forward_layernorms.{}.weight": "blocks.{}.feed_forward_norm.weight",
    "forward_layernorms.{}.bias": "blocks.{}.feed_forward_norm.bias",
    "forward_layers.{}.conv1.weight": "blocks.{}.inner.weight",
    "forward_layers.{}.conv1.bias": "blocks.{}.inner.bias",
    "forward_layers.{}.conv2.weight": "blocks.{}.outer.weight",
    "forward_layers.{}.conv2.bias": "blocks.{}.outer.bias",
}


def sasrec_names(ours):
    """Our weights under replay-rec's names."""
    table = ours["item_embedding"]
    found = {
        "item_embedder.item_emb.weight": np.concatenate([table, 0 * table[:1]]),
        "item_embedder.pos_emb.pe.weight": ours["position_embedding"],
        "output_normalization.last_layernorm.weight": ours["output_norm.weight"],
        "output_normalization.last_layernorm.bias": ours["output_norm.bias"],
    }
    for number in range(sum(name.endswith(".in_bias") for name in ours)):
        for theirs, name in BLOCK_NAMES.items():
            value = ours[name.format(number)]
            value = value[..., None] if "conv" in theirs and value.ndim == 2 else value
            found[f"sasrec_layers.{theirs.format(number)}"] = value
    return found


BERT_BLOCK_NAMES = {
    "attention.in_proj_weight": "in_weight",
    "attention.in_proj_bias": "in_bias",
    "attention.out_proj.weight": "out.weight",
    "attention.out_proj.bias": "out.bias",
    "attention_norm.weight": "attention_norm.weight",
    "attention_norm.bias": "attention_norm.bias",
    "pff_norm.weight": "feed_forward_norm.weight",
    "pff_norm.bias": "feed_forward_norm.bias",
    "pff.w_1.weight": "inner.weight",
    "pff.w_1.bias": "inner.bias",
    "pff.w_2.weight": "outer.weight",
    "pff.w_2.bias": "outer.bias",
}


def bert4rec_names(ours):
    """Our weights under replay-rec's names."""
    found = {
        "item_embedder.cat_embeddings.item_id.weight": ours["item_embedding"],
        "item_embedder.mask_embedding.weight": ours["mask_embedding"][None],
        "item_embedder.position.pe.weight": ours["position_embedding"],
        "_head.out_bias": ours["head_bias"],
    }
    for number in range(sum(name.endswith(".in_bias") for name in ours)):
        for theirs, name in BERT_BLOCK_NAMES.items():
            found[f"transformer_blocks.{number}.{theirs}"] = ours[f"blocks.{number}.{name}"]
    return found


def load(model, weights):
    """Set all parameters; names that stand for the same tensor twice need be given once."""
    missing, unexpected = model.load_state_dict(
        {name: torch.from_numpy(value) for name, value in weights.items()}, strict=False
    )
    left = [name for name in missing if not name.startswith("_head._item_embedder")]
    left = [name for name in left if not name.startswith("_head.") or "bias" in name]
    if left or unexpected:
        raise SystemExit(f"weights do not fit: missing {left}, unexpected {unexpected}")
