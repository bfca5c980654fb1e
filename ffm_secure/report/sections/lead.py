"""What an officer reads first: a sentence, then what was learned, what is promised, what was attacked."""

from __future__ import annotations

import math

from ffm_secure.quantities import INFINITE, amount, bound, count, figure, metric, small
from ffm_secure.records import AuditSummary, RunSummary
from ffm_secure.report import outcome
from ffm_secure.report.attack_rows import ANSWERS, attack_rows, count_outcomes
from ffm_secure.report.charts import sparkline
from ffm_secure.report.markup import OBSERVERS, Child, Html, facts, listed, number, promises, tag
from ffm_secure.report.sections.attacks import tally
from ffm_secure.report.sections.privacy import budget_words, worst
from ffm_secure.report.sections.rounds import opened


def lead_body(summary: RunSummary) -> Html:
    """Say in one sentence how the run ended, and in three cards what stands behind it."""
    lead = f"{_learned(summary)}; {_kept(summary)}; {_exposed(summary.audit)}"
    cards = tag(
        "div",
        _learned_card(summary),
        _promised_card(summary),
        _attacked_card(summary.audit),
        class_="cards three told",
    )
    return tag("div", tag("p", lead if lead.endswith((".", "!", "?")) else lead + ".", class_="lead"), cards)


def is_stamped(summary: RunSummary) -> bool:
    """Tell whether the run itself says that its epsilon is worth nothing."""
    return any(stamp.upper().startswith("NOT PRIVATE") for stamp in summary.stamps)


def _learned(summary: RunSummary) -> str:
    name = summary.metric_name[:1].upper() + summary.metric_name[1:]
    if not summary.rounds:
        return "No round has finished, so nothing was learned yet"
    finished = len(opened(summary.rounds))
    lost = len(summary.rounds) - finished
    rounds = f"{count(finished)} of {amount(finished + lost, 'round')}" if lost else amount(finished, "round")
    before, after = summary.metric_zero_round, summary.metric_final
    if not math.isfinite(after):
        return f"After {rounds} the {summary.metric_name} is {figure(after)}: training diverged"
    if math.isnan(before) or before == after:
        return f"{name} was {metric(after)} after {rounds}"
    words = (
        f"{name} {'rose' if after > before else 'fell'} from {metric(before)} to {metric(after)} in {rounds}"
    )
    if not outcome.beats(summary, before):
        return f"{words}, which is worse than not training"
    majority = summary.metric_majority
    if majority is None:
        return words
    return f"{words} (always guessing the most common class scores {metric(majority)})"


def _kept(summary: RunSummary) -> str:
    if is_stamped(summary) and any(s.finite for s in summary.statements):
        return "this run is not private, and its epsilon promises nothing"
    protected = [
        OBSERVERS[s.observer] for s in summary.statements if s.finite and s.epsilon <= summary.budget_epsilon
    ]
    open_ = [OBSERVERS[s.observer] for s in summary.statements if not s.finite]
    if not protected:
        return (
            "no privacy is guaranteed against anyone"
            if not any(s.finite for s in summary.statements)
            else "the privacy budget was overspent"
        )
    everyone = len(protected) == len(summary.statements) and len(set(protected)) == len(OBSERVERS)
    words = f"the privacy budget was kept against {'every observer' if everyone else listed(protected)}"
    return words if not open_ else f"{words}, but nothing is guaranteed against {listed(open_)}"


def _exposed(audit: AuditSummary | None) -> str:
    if audit is None:
        return "no attack was run, so what is exposed was not measured"
    if audit.sentence:
        sentence = audit.sentence
        return "audit: " + (sentence[0].lower() + sentence[1:] if sentence[1:2].islower() else sentence)
    leaked, answered = _answers(audit)
    return f"{leaked} of {amount(answered, 'attack')} that can tell found a leak"


def _answers(audit: AuditSummary) -> tuple[int, int]:
    """Return how many attacks found a leak, and how many can tell; the rest prove nothing."""
    counts = count_outcomes(attack_rows(audit.findings))
    return counts.get("leaked", 0), sum(counts.get(answer, 0) for answer in ANSWERS)


def _card(heading: str, big: Child, *rest: Child, words: bool = False) -> Html:
    return tag(
        "article",
        tag("h3", heading),
        tag("p", big, class_="big words" if words else "big"),
        *rest,
        class_="card",
    )


def _learned_card(summary: RunSummary) -> Html:
    direction = "higher is better" if summary.higher_is_better else "lower is better"
    rows: list[tuple[str, Child]] = [
        (
            "Before training",
            number(summary.metric_zero_round, metric(summary.metric_zero_round), "metric_zero_round"),
        ),
    ]
    if summary.metric_majority is not None:
        majority = number(summary.metric_majority, metric(summary.metric_majority), "metric_majority")
        rows.append(("Always the most common class", majority))
    rows += _rounds(summary)
    final = number(summary.metric_final, metric(summary.metric_final), "metric_final")
    note = tag(
        "p", f"{summary.metric_name} after the last round, on public rows; {direction}", class_="under"
    )
    return _card(
        "Learned",
        final,
        note,
        facts(rows, "facts short"),
        sparkline([record.metric for record in summary.rounds]),
        words=not math.isfinite(summary.metric_final),
    )


def _rounds(summary: RunSummary) -> list[tuple[str, Child]]:
    """Name the best round, where it is not the last."""
    best = outcome.best_round(summary)
    if best is None:
        return []
    place = next(index for index, record in enumerate(summary.rounds) if record.round == best.round)
    shown = number(best.metric, metric(best.metric), f"rounds.{place}.metric")
    return [(f"Best round, {best.round}, in best/", shown)]


def _promised_card(summary: RunSummary) -> Html:
    if not summary.statements:
        return _card(
            "Promised", INFINITE, tag("p", "No privacy statement was made.", class_="under"), words=True
        )
    place, statement = worst(summary.statements)
    shown = number(statement.epsilon, bound(statement.epsilon), f"statements.{place}.epsilon")
    budget = tag(
        "span", " of ", number(summary.budget_epsilon, budget_words(summary.budget_epsilon), "budget_epsilon")
    )
    words = "epsilon, the largest over data owners" if statement.finite else "no epsilon is guaranteed"
    if statement.finite and is_stamped(summary):
        words = "epsilon of the mechanism; this run does not keep it, see the warnings"
    against = next(promise.against for promise in promises(summary.statements) if place in promise.places)
    open_ = [s for s in summary.statements if not s.finite] if statement.finite else []
    rest = facts([(f"Against {OBSERVERS[s.observer]}", INFINITE) for s in open_]) if open_ else None
    return _card(
        "Promised",
        tag("span", shown, budget if statement.finite else None),
        tag("p", words, class_="under"),
        facts(
            [("Per", statement.unit), ("Against", against), ("Delta", small(statement.delta))], "facts brief"
        ),
        rest,
        tag("p", tag("a", "What that means", href="#promise"), class_="under"),
        words=not statement.finite,
    )


def _attacked_card(audit: AuditSummary | None) -> Html:
    if audit is None:
        return _card(
            "Attacked",
            "not audited",
            tag("p", "No attack was run on this run: exposure is not measured.", class_="under"),
            words=True,
        )
    leaked, answered = _answers(audit)
    return _card(
        "Attacked",
        f"{leaked} of {answered}",
        tag("p", f"attack{'' if answered == 1 else 's'} that can tell found a leak", class_="under"),
        tally(audit),
    )
