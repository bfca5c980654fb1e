"""A site attacks what left it, with the rows it kept beside: both stay in its folder."""

from __future__ import annotations

import time
from pathlib import Path

from attacks import steps
from attacks.registry import ATTACKS
from ffm_secure.agreed.loaded_model import load_model, read_facts
from ffm_secure.auditing.budget import AuditBudget, Watch, unwatched
from ffm_secure.auditing.recorded import audit_recorded
from ffm_secure.auditing.wording import decoder, sentence
from ffm_secure.config import run_file
from ffm_secure.records import AuditSummary
from ffm_secure.site.own_record import RUN_FILE


def audit_own_rounds(
    folder: Path, base: Path, *, budget: str = "quick", watch: Watch = unwatched
) -> AuditSummary:
    """Attack what a site kept of one run in a folder; the model is looked for from `base` on.

    Raises:
      StoreError, ModelError: what was kept is damaged, or the model has gone.
    """
    began = time.process_time()
    config = run_file.load(folder / RUN_FILE)
    model = load_model(config, base, read_facts(folder))
    attacks = [ATTACKS[name]() for name in ATTACKS]
    with steps.counted():
        purse = AuditBudget(name=budget, watch=watch)
        watch("what left this site", 0, len(attacks))
        findings = tuple(audit_recorded(model, folder, purse, attacks, decoder(model.backbone.tokenizer)))
    return AuditSummary(
        budget=budget,
        cpu_seconds=time.process_time() - began,
        findings=findings,
        epsilon_lower=None,
        sentence=sentence(findings),
    )
