"""The accountant on the command line: epsilon of a history, sigma for a target. Loads no model library."""

from __future__ import annotations

from defenses.dp.calculator import epsilon_report, sigma_report, tuned_report
from ffm_secure.display.console import clear_errors, number, say
from ffm_secure.errors import ConfigError


def epsilon(
    q: float | None,
    sigma: float | None,
    steps: int | None,
    *,
    delta: float,
    segments: tuple[str, ...],
    best_of: str = "",
    json: bool,
) -> None:
    """Print the epsilon of a history, or of choosing the best of a random number of runs of it."""
    with clear_errors():
        parts = [*_first_segment(q, sigma, steps), *(_segment(text) for text in segments)]
        if not parts:
            raise ConfigError(
                "epsilon", ["give --q, --sigma and --steps, or at least one --segment q,sigma,steps"]
            )
        if best_of:
            report = tuned_report(parts, delta, *_law(best_of))
        else:
            report = epsilon_report(parts, delta)
    say(report, [f"{name}: {number(value)}" for name, value in report.items()], json=json)


def sigma(
    epsilon: float, q: float, steps: int, *, delta: float, segments: tuple[str, ...], json: bool
) -> None:
    """Print the noise multiplier for a target epsilon."""
    with clear_errors():
        report = sigma_report(
            epsilon=epsilon,
            delta=delta,
            sampling_rate=q,
            steps=steps,
            history=[_segment(text) for text in segments],
        )
    say(report, [f"{name}: {number(value)}" for name, value in report.items()], json=json)


def _law(text: str) -> tuple[str, float]:
    law, _, number_text = text.partition(":")
    try:
        stopping = float(number_text)
    except ValueError:
        stopping = 0.0
    if law not in ("poisson", "geometric") or not stopping > 0:
        raise ConfigError(
            "epsilon",
            [f"--best-of = {text!r}: must be poisson:MEAN or geometric:STOPPING, for instance poisson:10"],
        )
    return law, stopping


def _first_segment(q: float | None, sigma: float | None, steps: int | None) -> list[tuple[float, float, int]]:
    options = {"--q": q, "--sigma": sigma, "--steps": steps}
    if all(value is None for value in options.values()):
        return []
    missing = []
    for name, value in options.items():
        if value is None:
            missing.append(f"{name}: missing")
    if missing:
        raise ConfigError("epsilon", missing)
    assert q is not None
    assert sigma is not None
    assert steps is not None
    return [(q, sigma, steps)]


def _segment(text: str) -> tuple[float, float, int]:
    parts = text.split(",")
    try:
        q, multiplier, steps = parts
        return float(q), float(multiplier), int(steps)
    except ValueError:
        raise ConfigError(
            "--segment",
            [f"{text!r}: must be sampling rate, noise multiplier, steps, for instance 0.01,1.0,1000"],
        ) from None
