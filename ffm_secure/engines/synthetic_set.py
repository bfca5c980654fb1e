"""The candidates that private records voted for, as a data set with what must be said beside it."""

from __future__ import annotations

from ffm_secure.engines.simulation import Simulation
from ffm_secure.queries import candidate_votes
from ffm_secure.report.croissant import Row, SyntheticSet
from ffm_secure.strategies import ServerState


def chosen(ready: Simulation, state: ServerState) -> SyntheticSet | None:
    """Return the candidates a run kept; None where it does not vote, or no question was answered by all.

    Guarantee: a function of opened sums and public texts.
    """
    question = ready.spec.questions.get(candidate_votes.NAME)
    standing = candidate_votes.standing_of(state)
    if question is None or not standing.chosen:
        return None
    candidates, names = ready.prepared.facts.candidates, ready.prepared.dataset.label_names or ()
    rows: list[Row] = []
    for place, label, votes in zip(standing.chosen, standing.labels, standing.votes, strict=True):
        rows.append({"text": candidates[place], "label": names[label], "votes": round(votes, 2)})
    settings = ready.config.federation.lifecycle.votes
    counts = ", ".join(
        f"{name} {count / settings.nearest:.0f}" for name, count in zip(names, standing.counts, strict=True)
    )
    return SyntheticSet(
        name=f"{ready.config.name}-synthetic",
        rows=rows,
        columns={
            "text": "a public candidate; nobody wrote it about a private row",
            "label": "the label under which most votes fell on it",
            "votes": f"votes under that label, with noise of deviation {standing.deviation:.2f}",
        },
        made_how=f"{len(rows)} of {len(candidates)} public candidates, chosen by noisy votes of the private "
        f"records of {len(ready.spec.owners)} data owners: each votes for the {settings.nearest} nearest "
        "under its own label.",
        released=(
            f"votes for {question.query.room} candidates under {len(names)} labels, summed over all records, "
            f"{len(ready.spec.questions[candidate_votes.NAME].schedule)} time(s)",
            f"with them the label counts ({counts}), as sums of votes",
        ),
    )
