"""Makes the network that a run asks for."""

from db.errors import SpecError
from db.spec import RunSpec
from trainer.models.network import SequenceModel
from trainer.models.sasrec import SASRec


def build_model(spec: RunSpec, num_items: int) -> SequenceModel:
    """Network of a run, its weights not drawn yet (`SequenceModel.reset_parameters`).

    Parameters
    ----------
    spec : RunSpec
    num_items : int
        Catalog size V.

    Raises
    ------
    SpecError
        An unknown model.
    """
    if spec.model == "sasrec":
        return SASRec(
            num_items,
            max_seq_len=spec.max_seq_len,
            embedding_dim=spec.embedding_dim,
            num_blocks=spec.num_blocks,
            num_heads=spec.num_heads,
            dropout_rate=spec.dropout_rate,
            attend_padding=spec.attend_padding,
            predict_first_item=spec.predict_first_item,
            count_padding=spec.count_padding,
        )
    raise SpecError(f"model={spec.model!r} is not built yet; use sasrec")
