"""The command `audit` on a model as it was released: who was in its training set, which secrets it says."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from ffm_secure.display.console import clear_errors, say
from ffm_secure.errors import ConfigError, LeakFound

_LEAK = "the released model gives training data away; see above"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleasedFiles:
    """What the options name: a model, records that were and were not trained on, planted secrets."""

    run: Path | None
    model: Path | None
    adapter: Path | None
    members: Path | None
    others: Path | None
    references: tuple[Path, ...]
    secrets: Path | None
    out: Path | None

    @property
    def asked(self) -> bool:
        """Say whether an audit of a released model was asked for."""
        return bool(self.members or self.others or self.secrets or self.references)


def audit(files: ReleasedFiles, *, other: bool, fail_on_leak: bool, json: bool, quiet: bool) -> None:
    """Audit a released model, or the models of a run's rounds; `other` says that an observation was named."""
    _check(files, other)
    from ffm_secure.auditing import released_model as auditing

    shown, lines = dict[str, object](), list[str]()
    if files.run is not None and files.secrets is not None:
        with clear_errors():
            rounds = auditing.audit_rounds(files.run, files.secrets)
        for name, results in rounds:
            shown[name] = [asdict(one) | {"leaked": one.leaked} for one in results]
            lines += [f"  {name}", *auditing.secret_lines(results)]
        say(shown, lines, json=json, quiet=quiet)
        if fail_on_leak and any(one.leaked for _, results in rounds for one in results):
            raise LeakFound(_LEAK)
        return
    assert files.model is not None
    released = auditing.Released(model=files.model, adapter=files.adapter, references=files.references)
    leaked = False
    with clear_errors():
        if files.members is not None and files.others is not None:
            result = auditing.audit_membership(released, files.members, files.others)
            leaked |= result.verdict == "leaked"
            shown |= auditing.public_part(result)
            lines += auditing.membership_lines(result)
            if files.out is not None:
                auditing.write_membership(result, files.out)
                exposed = files.out / "internal_exposed.json"
                lines.append(f"  written to {files.out}; for their owner alone: {exposed}")
        if files.secrets is not None:
            secrets = auditing.audit_secrets(released, files.secrets)
            leaked |= any(one.leaked for one in secrets)
            shown["secrets"] = [asdict(one) | {"leaked": one.leaked} for one in secrets]
            lines += auditing.secret_lines(secrets)
    say(shown, lines, json=json, quiet=quiet)
    if fail_on_leak and leaked:
        raise LeakFound(_LEAK)


def _check(files: ReleasedFiles, other: bool) -> None:
    problems = []
    if other:
        problems.append("--members, --reference and --secrets take --model alone, no --observation")
    if files.run is not None and (files.model or files.members or files.references):
        problems.append("a run takes --secrets alone; for --members name its model: --model RUN")
    if files.model is None and files.run is None:
        problems.append("--members and --secrets need --model, the folder of the released model")
    if (files.members is None) != (files.others is None):
        problems.append(
            "--members and --non-members belong together: records of one kind, trained on and not"
        )
    if files.references and files.members is None:
        problems.append("--reference belongs to --members")
    if files.out is not None and files.members is None:
        problems.append("--out belongs to --members")
    if files.out is not None and files.out.exists():
        problems.append(f"--out = {files.out}: exists, must be a new folder")
    if problems:
        raise ConfigError("audit", problems)
