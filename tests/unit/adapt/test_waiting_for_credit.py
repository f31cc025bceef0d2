"""A batch that is read while the bucket fills must not make the next update dearer, or the bucket never catches up."""

from __future__ import annotations

from reading_model import batches, trained_model

from thermoe.adapt.safeguards import Safeguards
from thermoe.adapt.test_time import RouterAdapter


def test_updates_go_on_at_the_rate_that_is_earned() -> None:
    model = trained_model()
    guards = Safeguards(judge_tokens=252, shadow=False)
    with RouterAdapter(model, bucket=0.05, safeguards=guards) as adapter:
        adapter.bucket.earns_scoring = False
        learned, asked = [], []
        for batch in batches("prose", 40):
            learned.append(adapter.score_and_learn(batch).verdict != "skipped")
            asked.append(adapter.bucket.capacity_j)
            # A fifth of what the first update may cost: one update in about five batches, the verdicts in addition.
            adapter.bucket.earn((asked[0] or 0.0) / 5 / 0.05)
    assert sum(learned[20:]) >= 2, "the later half learns as well"
    last, before = asked[-1], asked[20]
    assert last is not None and before is not None and last <= 2 * before, "what an update may cost stays bounded"
