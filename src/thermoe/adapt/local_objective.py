"""The objective "local": the router adapter learns from the local teacher, on the sequences that are due for an audit.

An audit replays a sequence that has just been scored, with every expert beside the chosen ones, as a forward of its
own that serves nobody and is paid as such. What follows is the adapter's: trust region, judge, and the way back, which
takes the teacher's evidence along.

Other settings of the teacher are another objective, registered under a name of its own:

    OBJECTIVES.register("local_often")(functools.partial(Local, rate=1 / 8))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from thermoe.adapt.learning_costs import LearningCosts
from thermoe.adapt.local_teacher import LocalTeacher
from thermoe.adapt.objectives import OBJECTIVES, LearnBatch, Proposal


@OBJECTIVES.register("local")
class Local:
    """The local teacher as an objective; for models whose experts partition one network, families "mix" and "bias".

    Args:
        model: converted with the method "partition".
        seed: of the choice of audited sequences.
        forgetting, min_tokens, rate: see `LocalTeacher`.

    Attributes:
        teacher: the teacher itself.

    Raises:
        RoutingError: the model does not fit, or its fast weights are of another family.
        ConfigError: a number is outside its range.
    """

    needs_graph = False

    def __init__(
        self,
        model: nn.Module,
        *,
        seed: int = 0,
        forgetting: float = 0.99,
        min_tokens: int = 512,
        rate: float | None = None,
    ) -> None:
        self.teacher = LocalTeacher(model, seed=seed, forgetting=forgetting, min_tokens=min_tokens, rate=rate)
        for name in self.teacher.layers:
            self.teacher.fast_of(name)

    def bound_j(self, costs: LearningCosts, batch_size: int, length: int) -> float:
        """Return the joules of a forward of the sequences that can be due, every expert on every token."""
        rows = self.teacher.schedule.most(batch_size)
        return costs.bound_j(rows * length, all_experts=True) if rows else 0.0

    def learn(self, batch: LearnBatch) -> Proposal:
        """Audit the sequences of the batch that are due, and set the fast weights once there are tokens enough."""
        weights = batch.weights.detach().cpu()
        # The first token is predicted from nothing and has no weight of its own; it goes with the second.
        by_token = torch.cat([weights[:, :1], weights], dim=1)
        lengths = (by_token > 0).sum(-1)
        rows = lengths.nonzero().flatten().tolist()
        due = [rows[i] for i in self.teacher.schedule.choose([int(lengths[row]) for row in rows])]
        if not due:
            return Proposal(None, 0.0, "no sequence of this batch is due for an audit")
        ids = batch.input_ids[due]
        mask = None if batch.attention_mask is None else batch.attention_mask[due]
        tokens = ids.numel() if mask is None else int(mask.sum())
        with batch.account.forward("audit", tokens, all_experts=True):
            report = self.teacher.audit(ids, mask, weights=by_token[due], layers=batch.fast)
        return Proposal(None, float(by_token[due].sum()), report.reason)

    def reset(self) -> None:
        """Forget the evidence and begin a new stream."""
        self.teacher.reset()

    def state_dict(self) -> dict[str, Any]:
        """Return the teacher's state; it does not change later on."""
        return self.teacher.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state of the teacher."""
        self.teacher.load_state_dict(state)
