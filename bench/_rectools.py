"""RecTools' transformers, for `_peer_process.py`.

Its network and loss functions are called as its `fit` calls them, with its own item 0, padding,
among the classes. Negatives are drawn within the step, as ours are.
"""

from functools import partial
from types import SimpleNamespace

import torch
from rectools.models.nn.item_net import IdEmbeddingsItemNet, SumOfEmbeddingsConstructor
from rectools.models.nn.transformers.lightning import TransformerLightningModule
from rectools.models.nn.transformers.negative_sampler import CatalogUniformSampler
from rectools.models.nn.transformers.net_blocks import (
    LearnableInversePositionalEncoding,
    PreLNTransformerLayers,
)
from rectools.models.nn.transformers.sasrec import SASRecTransformerLayers
from rectools.models.nn.transformers.similarity import DistanceSimilarityModule
from rectools.models.nn.transformers.torch_backbone import TransformerTorchBackbone

CRITERIA = {
    "ce": TransformerLightningModule._calc_softmax_loss,
    "bce": TransformerLightningModule._calc_bce_loss,
    # a method that asks nothing of its module but another loss, which the class has too
    "ce_minus": partial(
        TransformerLightningModule._calc_sampled_softmax_loss, TransformerLightningModule
    ),
}


def reduced_overconfidence(job):
    """RecTools' gBCE, which asks its module for two numbers."""
    data = SimpleNamespace(n_negatives=job["num_negatives"])
    holder = SimpleNamespace(data_preparator=data, gbce_t=job["gbce_t"])

    def loss(logits, y, w):
        logits = TransformerLightningModule._get_reduced_overconfidence_logits(
            holder, logits, job["num_items"]
        )
        return TransformerLightningModule._calc_bce_loss(logits, y, w)

    return loss


class SasRec:
    """`rectools.models.SASRecModel`."""

    layers_type = SASRecTransformerLayers
    causal = True
    extra_items = 1  # padding

    def __init__(self, job, weights):
        sizes = {"n_factors": job["embedding_dim"], "dropout_rate": job["dropout_rate"]}
        self.num_classes = job["num_items"] + self.extra_items
        self.module = TransformerTorchBackbone(
            n_heads=job["num_heads"],
            dropout_rate=job["dropout_rate"],
            item_model=SumOfEmbeddingsConstructor(
                self.num_classes, [IdEmbeddingsItemNet(n_items=self.num_classes, **sizes)]
            ),
            pos_encoding_layer=LearnableInversePositionalEncoding(
                use_pos_emb=True,
                session_max_len=job["max_seq_len"],
                n_factors=job["embedding_dim"],
                use_scale_factor=self.causal,  # as ours
            ),
            transformer_layers=self.layers_type(
                n_blocks=job["num_blocks"],
                n_heads=job["num_heads"],
                ff_factors_multiplier=4,
                **sizes,
            ),
            similarity_module=DistanceSimilarityModule(),
            use_causal_attn=self.causal,
            use_key_padding_mask=not self.causal,
        )
        self.negatives = CatalogUniformSampler(n_negatives=job["num_negatives"])
        self.sampled = job["loss"] != "ce"
        self.criterion = (
            reduced_overconfidence(job) if job["loss"] == "gbce" else CRITERIA[job["loss"]]
        )
        self.load(weights)

    def load(self, weights):
        """Set our weights under RecTools' names; layer norms keep RecTools' own epsilon."""
        table = weights["item_embedding"]
        found = {
            "item_model.item_net_blocks.0.ids_emb.weight": torch.cat(
                [torch.zeros(1, table.shape[1]), torch.from_numpy(table)]
            ),
            # RecTools counts positions from the end
            "pos_encoding_layer.pos_emb.weight": weights["position_embedding"][::-1].copy(),
            "transformer_layers.last_layernorm.weight": weights["output_norm.weight"],
            "transformer_layers.last_layernorm.bias": weights["output_norm.bias"],
        }
        for number in range(sum(name.endswith(".in_bias") for name in weights)):
            for theirs, ours in BLOCK_NAMES.items():
                found[f"transformer_layers.transformer_blocks.{number}.{theirs}"] = weights[
                    f"blocks.{number}.{ours}"
                ]
        state = {name: torch.as_tensor(value) for name, value in found.items()}
        missing, unexpected = self.module.load_state_dict(state, strict=False)
        if unexpected or [name for name in missing if "catalog" not in name]:
            raise SystemExit(f"weights do not fit: missing {missing}, unexpected {unexpected}")

    def batch(self, arrays):
        mask = arrays["mask"]
        labels = (arrays["targets"] + 1) * mask
        return {"x": (arrays["items"] + 1) * mask, "y": labels, "yw": mask.float()}

    def num_targets(self, batch):
        return int((batch["y"] > 0).sum())

    def loss(self, batch):
        candidates = None
        if self.sampled:
            drawn = self.negatives.get_negatives(
                batch, lowest_id=self.extra_items, highest_id=self.num_classes
            )
            candidates = torch.cat([batch["y"].unsqueeze(-1), drawn.to(batch["y"].device)], dim=-1)
        logits = self.module(batch=batch, candidate_item_ids=candidates)
        return self.criterion(logits, batch["y"], batch["yw"])


class Bert4Rec(SasRec):
    """`rectools.models.BERT4RecModel`; a masked item becomes its item 1."""

    layers_type = PreLNTransformerLayers
    causal = False
    extra_items = 2  # padding, mask

    def load(self, weights):
        """Keep RecTools' drawn weights: its network has no bias per item."""
        for parameter in self.module.parameters():
            if parameter.dim() > 1:
                torch.nn.init.xavier_normal_(parameter.data)

    def batch(self, arrays):
        mask, masked = arrays["mask"], arrays["masked"]
        items = ((arrays["items"] + 2) * mask).masked_fill(masked, 1)
        return {"x": items, "y": (arrays["items"] + 2) * masked, "yw": mask.float()}


BLOCK_NAMES = {
    "multi_head_attn.in_proj_weight": "in_weight",
    "multi_head_attn.in_proj_bias": "in_bias",
    "multi_head_attn.out_proj.weight": "out.weight",
    "multi_head_attn.out_proj.bias": "out.bias",
    "q_layer_norm.weight": "attention_norm.weight",
    "q_layer_norm.bias": "attention_norm.bias",
    "ff_layer_norm.weight": "feed_forward_norm.weight",
    "ff_layer_norm.bias": "feed_forward_norm.bias",
    "feed_forward.ff_linear_1.weight": "inner.weight",
    "feed_forward.ff_linear_1.bias": "inner.bias",
    "feed_forward.ff_linear_2.weight": "outer.weight",
    "feed_forward.ff_linear_2.bias": "outer.bias",
}
