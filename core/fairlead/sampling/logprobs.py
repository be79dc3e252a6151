"""Log-probabilities as they are reported: a chosen token, its rank, and the best ones.

Shapes: R rows, V vocabulary, K best tokens.
"""

from collections.abc import Sequence as Seq

import torch

from fairlead.request import TokenLogprobs


def token_logprobs(logprobs_RV: torch.Tensor, chosen_R: torch.Tensor, wanted: Seq[int]) -> list[TokenLogprobs]:
    """Per row: the chosen token, then the best ones, as many as `wanted` says of it."""
    chosen_R1 = chosen_R[:, None]
    value_R1 = logprobs_RV.gather(1, chosen_R1)
    rank_R: list[int] = ((logprobs_RV > value_R1).sum(-1) + 1).tolist()
    top_values_RK, top_ids_RK = logprobs_RV.topk(min(max(wanted), logprobs_RV.shape[1]), dim=-1)
    ids: list[list[int]] = torch.cat((chosen_R1, top_ids_RK), dim=1).tolist()
    values: list[list[float]] = torch.cat((value_R1, top_values_RK), dim=1).tolist()
    return [
        TokenLogprobs(token_ids=tuple(row_ids[: k + 1]), logprobs=tuple(row_values[: k + 1]), rank=rank)
        for row_ids, row_values, rank, k in zip(ids, values, rank_R, wanted, strict=True)
    ]
