"""What a run file is called, and must declare, among parties who never see each other's rows."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Iterator
from dataclasses import replace

from ffm_secure.config import compatibility
from ffm_secure.config.distilled import distils
from ffm_secure.config.run_file import Audit, RunConfig, Speed
from ffm_secure.config.schema import chosen_table, dump_toml
from ffm_secure.errors import PlanRefused


def run_digest(config: RunConfig) -> str:
    """Name a run file by every choice in it that shapes a result; speed and audit are each party's own.

    Guarantee: what stands at its default is left out, so a release that adds settings names a run as before;
    one in which a default has another value names a file of old, which has all values in it, otherwise.
    """
    shaping = replace(config, speed=Speed(), audit=Audit())
    choices = dump_toml(chosen_table(shaping))
    return hashlib.sha256(b"ffm-secure run 2" + choices.encode()).hexdigest()


def release() -> str:
    """Return the major and minor version of this software: what two parties of a run must share."""
    version = importlib.metadata.version("ffm-secure")
    return ".".join(version.split(".")[:2])


def shared_objections(config: RunConfig, *, sites: int) -> tuple[str, ...]:
    """Return what keeps a run file from being run among machines, where nobody sees another's rows."""
    return tuple(_shared(config, sites))


def _shared(config: RunConfig, sites: int) -> Iterator[str]:
    task = config.task
    try:
        compatibility.check(config)
    except PlanRefused as refused:
        yield from refused.reasons
    if task.clients != sites:
        yield f"task.clients = {task.clients}: must be {sites}, the number of sites on the roster"
    if task.nominal_examples == 0:
        yield "task.nominal_examples = 0: say a public size of one site's data; nobody counts another's rows"
    if task.kind.endswith("_classification") and not task.class_names:
        yield (
            "task.class_names = []: declare the classes in order; no site may learn them from another's rows"
        )
    if task.kind.endswith("_classification") and not task.label_column:
        yield "task.label_column = '': name it, so that every site reads the same column"
    if task.kind.startswith("image") and not task.image_column:
        yield "task.image_column = '': name it, so that every site reads the same column"
    if not task.kind.startswith("image") and not task.text_column:
        yield "task.text_column = '': name it, so that every site reads the same column"
    if config.evaluation.rows != "public":
        yield "evaluation.rows = 'held_back': sites of their own hold no rows back yet; use public rows"
    if config.personal.kind != "none":
        yield (
            f"personal.kind = '{config.personal.kind}': sites of their own make no model of their own yet; "
            "leave it at 'none'"
        )
    if distils(config):
        yield (
            "federation.lifecycle.kind = 'distillation': sites of their own have no public rows in common "
            "yet; run it in one place"
        )
    if task.stream.order:
        yield "task.stream.order: sites of their own have no stages yet; leave the stream out"
    if task.validation == "hold_out":
        yield "task.validation = 'hold_out': a site parts nothing off; public rows are the coordinator's"
    if config.federation.dropout.rate:
        yield "federation.dropout.rate: losses are not simulated among machines; leave it at 0"
    if config.federation.lifecycle.public_examples:
        yield "federation.lifecycle.public_examples: give public_data; no site's rows become public"
