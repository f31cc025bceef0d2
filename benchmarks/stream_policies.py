"""The policies under which a stream of text is read: all experts, prices that leave a share of them, and OEA.

Prices are searched so that the share is left on calibration text, as if `batch` sequences were decoded together.
"""

from __future__ import annotations

import argparse
import math

from energy_router import install
from shifting_text import Texts, chosen_experts, scored
from torch import Tensor, nn

from thermoe.compare.decode_cost import DecodeCost, choices_of
from thermoe.energy.cost_model import CostModel
from thermoe.moe.layer import routed_modules

#: Policies with a price, and the share of top-k's distinct experts, or of a layer's, that it is set for.
SHARES = {"half": 0.5, "quarter": 0.25, "quarter-of-layer": 0.25}


def set_policy(model: nn.Module, args: argparse.Namespace, policy: str, *, grouped: bool) -> None:
    """Give the model a policy by name."""
    kind, price = {"all": ("topk", 0.0), "oea1": ("oea", 1.0)}.get(policy) or ("priced-f4", args.prices[policy])
    install(model, args, kind, price, grouped=grouped)


def distinct_experts(model: nn.Module, rows: Tensor, batch: int) -> float:
    """Return distinct experts per layer as if ``batch`` rows were decoded together."""
    with chosen_experts(model) as take:
        found = []
        for part in rows[: len(rows) // batch * batch].split(batch):
            scored(model, part)
            found.append(take()["distinct_experts"])
    return sum(found) / len(found)


def find_prices(model: nn.Module, args: argparse.Namespace, rows: Tensor) -> None:
    """Set ``args.prices`` so that the shares of distinct experts are left on ``rows``, by bisection of log price."""
    install(model, args, "topk", 0.0)
    args.distinct_all = distinct_experts(model, rows, args.batch)
    args.prices = {}
    layer = next(iter(routed_modules(model)))[1].router.num_experts
    for policy, share in SHARES.items():
        wanted = share * (layer if policy.endswith("-of-layer") else args.distinct_all)
        low, high = math.log(1e-4 * args.mean), math.log(1e3 * args.mean)
        for _ in range(args.bisections):
            middle = (low + high) / 2
            args.prices[policy] = math.exp(middle)
            set_policy(model, args, policy, grouped=True)
            many = distinct_experts(model, rows, args.batch) > wanted
            low, high = (middle, high) if many else (low, middle)
        args.prices[policy] = math.exp((low + high) / 2)
        set_policy(model, args, policy, grouped=True)
        left = distinct_experts(model, rows, args.batch)
        print(f"{policy}: price {args.prices[policy]:.4g} nats per opened expert leaves {left:.2f} of "
              f"{args.distinct_all:.2f} distinct experts", flush=True)  # fmt: skip


def served_j(model: nn.Module, args: argparse.Namespace, texts: Texts) -> float | None:
    """Return the modelled joules of decoding a batch under the present policy; ``None`` where batches are scored only.

    It is what the bucket of learning earns a share of.
    """
    if args.served == "scoring":
        return None
    cost, joules = DecodeCost(model, CostModel.prior(args.gpu)), []
    with choices_of(model) as take:
        for rows in texts.calibration.split(args.batch):
            if len(rows) == args.batch:
                scored(model, rows)
                joules.append(cost.decode_j(take()))
    return sum(joules) / len(joules)
