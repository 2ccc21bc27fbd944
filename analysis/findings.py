"""The nineteen claims of the paper as computations, for the runs of any sweep."""

from dataclasses import dataclass

import pandas as pd

from analysis import claims_losses as losses
from analysis import claims_scaling as scaling
from analysis.evidence import Finding, findings_frame
from analysis.frame import comparable, same_memory
from analysis.importance import Importances


@dataclass(frozen=True)
class Claim:
    """What the paper says, and what is computed to test it."""

    number: int
    text: str
    measure: str


CLAIMS: tuple[Claim, ...] = (
    Claim(1, "Memory and NDCG@10 rise together on every dataset",
          "Spearman's rho of memory and NDCG@10; above 0"),
    Claim(2, "Batch size and negatives influence quality the most, then sequence length",
          "Out-of-sample R² lost by shuffling the weaker of bs and ns, less that of sl; above 0"),
    Claim(3, "The products bs·ns and sl·bs stand out",
          "Impurity importance of the weaker product; above an even share of 1/6"),
    Claim(4, "A random forest on the parameters reaches R² > 0.95",
          "Out-of-sample R² of the worst predicted of NDCG, Coverage, Surprisal; above 0.95"),
    Claim(5, "NDCG@10 keeps growing with memory, but saturates on Beauty and Gowalla",
          "Relative gain of the best run by the last doubling of memory; above or below 1 %"),
    Claim(6, "Moderate numbers of negatives are best; the full softmax wins only on Zvuk",
          "Lead of 64-512 negatives over fewer and over more, in shares of the best; above 0"),
    Claim(7, "Larger batches are better, with exceptions on ML-20M, Zvuk and 30Music",
          "Gain of the larger batch at equal sl and ns, in shares of the best NDCG@10"),
    Claim(8, "Longer sequences help when the batch size is 256 or more",
          "Gain of the longest over the shortest, in shares of the best NDCG@10; above 0"),
    Claim(9, "Scaling one factor alone gains less than scaling two together",
          "Lead of two doubled over one times four, in shares of the best NDCG@10; above 0"),
    Claim(10, "Within a memory budget the most negatives, or all, are not the best choice",
          "Share of the budget's best NDCG@10 that the most negatives lose; above 1 %"),
    Claim(11, "CCE and CCE- save 75-97 % memory and 23-71 % time against CE and CE-",
          "Share of memory saved; above 75 %, and of time above 23 %"),
    Claim(12, "CCE- beats CCE in NDCG@10 (4 of 6 datasets) and time (5 of 6)",
          "Relative NDCG@10 of CCE- at its best ns; above 0, and time saved above 0"),
    Claim(13, "Filtering gradients up to 1e-4 costs nothing, and improves ML-20M",
          "Relative NDCG@10 with filtering; above -1 % (ML-20M: above 0)"),
    Claim(14, "CCE- is more than three times faster than filtered CCE",
          "Epoch time of CCE filtered at 1e-4 over that of CCE-; above 3"),
    Claim(15, "Popularity sampling lowers NDCG and raises Surprisal",
          "Share of NDCG@10 lost; above 0, and Surprisal@10 higher"),
    Claim(16, "SCE has a higher Surprisal than CCE-",
          "Relative Surprisal@10; above 0"),
    Claim(17, "BCE is worst in NDCG and Coverage",
          "Smallest lead of another loss over BCE in NDCG@10; above 0, and in Coverage@10"),
    Claim(18, "Reallocating the saved memory improves NDCG only where V > 800,000",
          "Relative NDCG@10 of the best fused over the best materialised run; above or below 5 %"),
    Claim(19, "The final layer takes about 90 % of training memory",
          "Share of CE's memory that CCE does without; above 85 %"),
)  # fmt: skip
"""The claims, in the order of the paper."""


@dataclass(frozen=True)
class Findings:
    """Verdicts on all claims."""

    rows: tuple[Finding, ...]

    def to_frame(self) -> pd.DataFrame:
        """One row per claim and dataset, with the columns of `findings.csv`."""
        return findings_frame(self.rows)

    def runs_frame(self) -> pd.DataFrame:
        """Columns claim, dataset, run_key: the runs behind each verdict."""
        return pd.DataFrame(
            [(row.claim, row.dataset, key) for row in self.rows for key in row.run_keys],
            columns=["claim", "dataset", "run_key"],
        )

    def texts_frame(self) -> pd.DataFrame:
        """Columns of `to_frame` and the claim's text and measure, and the reason."""
        texts = {claim.number: claim for claim in CLAIMS}
        table = self.to_frame()
        table["text"] = [texts[row.claim].text for row in self.rows]
        table["measure"] = [texts[row.claim].measure for row in self.rows]
        table["reason"] = [row.reason for row in self.rows]
        return table


def findings(frame: pd.DataFrame, importances: Importances) -> Findings:
    """Judge every claim on every dataset.

    Parameters
    ----------
    frame : DataFrame
        Finished runs (`analysis.frame.Runs.frame`).
    importances : Importances
        Of the comparable runs of this frame.

    Returns
    -------
    Findings
        A claim that these runs cannot decide says what is missing. The intervals are over
        settings: they hold the variation between seeds only where a sweep has several.
    """
    alike, _ = comparable(frame)
    unfused = alike[alike["loss"].isin(("ce", "ce_minus"))]
    family = unfused if len(unfused) else alike
    measured, _ = same_memory(family)
    elsewhere, _ = same_memory(frame)
    found = [
        *scaling.memory_and_quality(measured),
        *scaling.most_influential(importances, alike),
        *scaling.products(importances, alike),
        *scaling.fit(importances, alike),
        *scaling.growth(measured),
        *scaling.negatives(family),
        *scaling.batch_size(family),
        *scaling.sequence_length(family),
        *scaling.two_together(family),
        *scaling.headline(measured),
        *losses.fused_savings(elsewhere),
        *losses.sampled_against_full(elsewhere),
        *losses.filtering(frame),
        *losses.faster_than_filtered(elsewhere),
        *losses.popularity(frame),
        *losses.sce_surprisal(frame),
        *losses.bce_worst(frame),
        *losses.reallocated(frame),
        *losses.final_layer(elsewhere),
    ]
    return Findings(tuple(found))
