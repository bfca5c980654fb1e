"""Canaries in a whole federated run, in the short form of the benchmark:
what is honest passes, what is not is flagged.
"""

from __future__ import annotations

from benchmarks.canary import audited_run, verdict


def test_the_honest_run_stays_below_its_ledger_and_a_weakened_one_does_not() -> None:
    honest = audited_run("none", quick=True, seeded=True)
    assert honest["ledger"] <= 8.0 <= honest["cover"] * 1.01
    assert verdict(honest) == "passes"
    assert honest["bounds"]["Gaussian"] > 1.0, "an audit that finds nothing proves nothing"
    broken = audited_run("no clipping", quick=True, seeded=True)
    assert broken["ledger"] == honest["ledger"], "the ledger charges what the run claims, not what it does"
    assert verdict(broken).startswith("flagged")
    assert broken["bounds"]["Gaussian"] > 2 * broken["ledger"]
