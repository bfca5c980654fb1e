"""Secure aggregation `ffm-secagg/2`: the server learns the sum of the clients' vectors and nothing else.

A session, in process:

    operator, people = Identity.generate(source), [Identity.generate(source) for _ in range(5)] roster =
    Roster.issue(operator, [person.public_key for person in people], federation="hospitals", serial=1,
        expires=now + 86400)
    graph = find_graph_parameters(5, corrupted=0.0, dropouts=0.2, mode="active")
    parameters = SessionParameters(run_id=run_id, round=1, mode="active", graph=graph.kind, clients=5,
        neighbours=graph.neighbours, threshold=graph.threshold, minimum_survivors=4, modulus_bits=32,
        length=length, backbone_hash=..., layout_hash=..., quantization_hash=..., mechanism_hash=...,
        model_hash=..., roster=roster)
    policy = ClientPolicy(operator=operator.public_key, federation="hospitals", run_id=run_id,
    backbone_hash=...,
        layout_hash=..., quantization_hash=..., mechanism_hash=..., minimum_survivors=4)
    clients = {person.id: ClientSession(person, parameters, policy, RandomSource.system(), now=now) for person
    in people} outcome = drive(clients, ServerSession(parameters), lambda owner: contribution_of(owner))

Over a network the same two classes take and return the bytes; see `ClientSession` and `ServerSession`.
"""

from defenses.replay_guard import ReplayGuard
from defenses.secagg.client import ClientSession, Stage
from defenses.secagg.cohort import CohortRule, choose_cohort, seeded_cohorts, whole_roster
from defenses.secagg.complaints import Complaint, left_out
from defenses.secagg.digests import layout_digest, rule_digest
from defenses.secagg.driver import Contribution, Outcome, drive
from defenses.secagg.graph import GraphParameters, find_graph_parameters
from defenses.secagg.keys import Identity, Roster
from defenses.secagg.lanes import Lanes
from defenses.secagg.masks import Mask, RingVector, add_masks
from defenses.secagg.parameters import DEFERRED_MODEL, FEWEST_SURVIVORS, ClientPolicy, SessionParameters
from defenses.secagg.ring import (
    HEADER,
    MODULUS_BITS,
    OpenedSum,
    Quantizer,
    add_into,
    check_overflow,
    frame,
    from_signed,
    modulus_for,
    pack,
    signed,
    unframe,
    unpack,
)
from defenses.secagg.server import NotEnoughClients, RingSum, ServerSession, Traffic

__all__ = [
    "DEFERRED_MODEL",
    "FEWEST_SURVIVORS",
    "HEADER",
    "MODULUS_BITS",
    "ClientPolicy",
    "ClientSession",
    "CohortRule",
    "Complaint",
    "Contribution",
    "GraphParameters",
    "Identity",
    "Lanes",
    "Mask",
    "NotEnoughClients",
    "OpenedSum",
    "Outcome",
    "Quantizer",
    "ReplayGuard",
    "RingSum",
    "RingVector",
    "Roster",
    "ServerSession",
    "SessionParameters",
    "Stage",
    "Traffic",
    "add_into",
    "add_masks",
    "check_overflow",
    "choose_cohort",
    "drive",
    "find_graph_parameters",
    "frame",
    "from_signed",
    "layout_digest",
    "left_out",
    "modulus_for",
    "pack",
    "rule_digest",
    "seeded_cohorts",
    "signed",
    "unframe",
    "unpack",
    "whole_roster",
]
