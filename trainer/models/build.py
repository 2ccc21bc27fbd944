"""Makes the network that a run asks for."""

from typing import Any

from db.spec import RunSpec
from trainer.models.bert4rec import BERT4Rec
from trainer.models.network import SequenceModel
from trainer.models.sasrec import SASRec


def build_model(spec: RunSpec, num_items: int) -> SequenceModel:
    """Network of a run, its weights not drawn yet (`SequenceModel.reset_parameters`).

    Parameters
    ----------
    spec : RunSpec
    num_items : int
        Catalog size V.
    """
    shape: dict[str, Any] = {
        "max_seq_len": spec.max_seq_len,
        "embedding_dim": spec.embedding_dim,
        "num_blocks": spec.num_blocks,
        "num_heads": spec.num_heads,
        "dropout_rate": spec.dropout_rate,
    }
    if spec.model == "bert4rec":
        return BERT4Rec(num_items, **shape, mask_probability=spec.mask_probability)
    return SASRec(
        num_items,
        **shape,
        attend_padding=spec.attend_padding,
        predict_first_item=spec.predict_first_item,
        count_padding=spec.count_padding,
    )
