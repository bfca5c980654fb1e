"""Measure secure aggregation: masking against the cipher's own rate, whole sessions, bytes, and a peer side
by side.

    python -m benchmarks.secagg [--quick] [--large] [--peer PYTHON] [--json]

All times are CPU seconds of one process. Masking is measured interleaved with the bare AES-256-CTR keystream
of the same length, written in place over the same memory. Sessions are played in process with every party's
time booked to it. `--large` adds 1,000 clients on a ring of 142 neighbours (minutes). `--peer` names a Python
interpreter of an environment with Flower installed; its published SecAgg+ functions then do the same work,
interleaved with ours. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cryptography
import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from defenses.random_source import RandomSource
from defenses.secagg import (
    ClientPolicy,
    ClientSession,
    Identity,
    Mask,
    Quantizer,
    ReplayGuard,
    Roster,
    ServerSession,
    SessionParameters,
    Stage,
    add_masks,
    shamir,
)
from defenses.secagg.graph import Mode, threshold_above
from defenses.secagg.lanes import Lanes
from defenses.secagg.ring import largest_sum

PEER_WORKER = Path(__file__).with_name("secagg_peer.py")


def cpu_seconds(act: Callable[[], Any]) -> float:
    """Time one call."""
    start = time.process_time()
    act()
    return time.process_time() - start


def interleaved(repeats: int, *acts: Callable[[], Any]) -> list[list[float]]:
    """Time several acts in turn, so that they meet the same weather."""
    return [
        list(times)
        for times in zip(*([cpu_seconds(act) for act in acts] for _ in range(repeats)), strict=True)
    ]


# Masking against the keystream


def measure_masking(length: int, neighbours: int, repeats: int) -> dict[str, float]:
    """Compare adding 1 + neighbours masks to a vector with writing as much keystream over it."""
    vector = np.zeros(length, dtype=np.uint32)
    masks = [Mask(bytes([seed]) * 32, negative=seed % 2 == 0) for seed in range(neighbours + 1)]
    zeros, view = bytes(1 << 18), memoryview(vector).cast("B")

    def keystream() -> None:
        for mask in masks:
            update_into = Cipher(algorithms.AES256(mask.seed), modes.CTR(bytes(16))).encryptor().update_into
            for start in range(0, len(view), len(zeros)):
                part = view[start : start + len(zeros)]
                update_into(zeros if len(part) == len(zeros) else zeros[: len(part)], part)

    def masked() -> None:
        add_masks(vector, masks)

    raw, ours = interleaved(repeats, keystream, masked)
    volume = vector.nbytes * len(masks)
    pairs = [one / other for one, other in zip(raw, ours, strict=True)]
    return {
        "length": length,
        "neighbours": neighbours,
        "keystream_seconds": min(raw),
        "masking_seconds": min(ours),
        "keystream_gigabytes_per_second": volume / min(raw) / 1e9,
        "masking_gigabytes_per_second": volume / min(ours) / 1e9,
        "share_of_keystream_rate": min(raw) / min(ours),
        "share_median_of_pairs": statistics.median(pairs),
    }


# Whole sessions


NAME = b"m" * 32
HASHES = {name: bytes(32) for name in ("backbone_hash", "layout_hash", "quantization_hash", "mechanism_hash")}


def gather(
    count: int,
    length: int,
    *,
    mode: Mode,
    modulus_bits: int,
    survivors: int,
    neighbours: int | None,
    threshold: int | None,
) -> tuple[SessionParameters, ClientPolicy, list[Identity], RandomSource]:
    """Bring the parties of a session together."""
    source = RandomSource.seeded(4)
    operator = Identity.generate(source)
    people = sorted((Identity.generate(source) for _ in range(count)), key=lambda person: person.id)
    degree = neighbours if neighbours is not None else count - 1
    colluders = count // 10
    parameters = SessionParameters(
        run_id=source.random_bytes(16),
        round=1,
        mode=mode,
        graph="complete" if neighbours is None else "harary",
        clients=count,
        neighbours=degree,
        threshold=threshold or threshold_above(neighbours=degree, corrupted=colluders, mode=mode),
        minimum_survivors=survivors,
        modulus_bits=modulus_bits,
        length=length,
        model_hash=NAME,
        roster=Roster.issue(
            operator, [person.public_key for person in people], federation="bench", serial=0, expires=1
        ),
        **HASHES,
    )
    honest = min(3, survivors - colluders)
    policy = ClientPolicy(
        operator=operator.public_key, federation="bench", run_id=parameters.run_id, colluders=colluders,
        minimum_honest=honest, modes=frozenset({mode}), **HASHES,
    )  # fmt: skip
    return parameters, policy, people, source


def measure_session(
    count: int,
    length: int,
    lost: int,
    *,
    mode: Mode = "active",
    modulus_bits: int = 32,
    neighbours: int | None = None,
    threshold: int | None = None,
) -> dict[str, Any]:
    """Play one session with clients lost after they dealt their shares; book time and bytes to each party."""
    parameters, policy, people, source = gather(
        count, length, mode=mode, modulus_bits=modulus_bits, survivors=count - lost, neighbours=neighbours,
        threshold=threshold,
    )  # fmt: skip
    clients = [
        ClientSession(person, parameters, policy, source.derive(place), now=0)
        for place, person in enumerate(people)
    ]
    server = ServerSession(parameters)
    spent: dict[bytes, float] = {session.id: 0.0 for session in clients}
    stages: dict[str, list[float]] = {}
    served = 0.0
    vector = np.arange(length, dtype=np.uint32)

    def serve(act: Callable[[], Any]) -> Any:
        nonlocal served
        start = time.process_time()
        result = act()
        served += time.process_time() - start
        return result

    def act(session: ClientSession, stage: Stage, answer: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = answer()
        elapsed = time.process_time() - start
        spent[session.id] += elapsed
        stages.setdefault(stage.name.lower(), []).append(elapsed)
        return result

    for one in clients:
        message = act(one, Stage.ADVERTISE, one.advertise)
        serve(lambda m=message: server.receive_advertisement(m))
    for one in clients:
        roster = serve(lambda o=one: server.roster_message(o.id))
        message = act(one, Stage.SHARE, lambda o=one, r=roster: o.share(r))
        serve(lambda m=message: server.receive_shares(m))
    staying = clients[lost:]
    for one in staying:
        delivery = serve(lambda o=one: server.delivery_for(o.id))
        message = act(
            one, Stage.MASK, lambda o=one, d=delivery: o.mask(d, vector, update=NAME, model_hash=NAME)
        )
        serve(lambda m=message: server.receive_masked_input(m))
    for one in staying if mode == "active" else []:
        survivors = serve(lambda o=one: server.survivors_message(o.id))
        message = act(one, Stage.CONFIRM, lambda o=one, s=survivors: o.confirm(s))
        serve(lambda m=message: server.receive_confirmation(m))
    for one in staying:
        request = serve(lambda o=one: server.request_for(o.id))
        message = act(one, Stage.UNMASK, lambda o=one, r=request: o.unmask(r))
        serve(lambda m=message: server.receive_response(m))
    opened = serve(server.finish)
    if not (opened.vector == vector * np.uint32(len(staying))).all():
        raise AssertionError("the opened sum is not the sum")
    up, down = server.traffic[staying[0].id].total
    degree, payload = parameters.neighbours, length * modulus_bits // 8
    stated = (
        194 + 130 + 86 * degree + 98 + 98 * (mode == "active") + 98 + 33 * degree
    )  # docs/secagg.md, messages R0 to R4
    times = sorted(spent[session.id] for session in staying)
    return {
        "clients": count,
        "length": length,
        "lost": lost,
        "mode": mode,
        "neighbours": parameters.neighbours,
        "threshold": parameters.threshold,
        "modulus_bits": modulus_bits,
        "client_seconds": statistics.median(times),
        "client_seconds_slowest": times[-1],
        "server_seconds": served,
        "client_stage_seconds": {name: statistics.median(values) for name, values in stages.items()},
        "bytes_up": up,
        "bytes_down": down,
        "bytes_up_per_parameter": payload / length,
        "control_bytes_up": up - payload,
        "control_bytes_up_stated": stated,
    }


# Beside a peer


def our_work(
    length: int, neighbours: int, dealers: int, threshold: int, rounds: int
) -> dict[str, Callable[[], Any]]:
    """Return the pieces of work that the peer's functions are timed on, in ours; every client brings 16-bit
    values.

    With lanes as many values share a 64-bit word as the sum of all clients allows; without, each has a word
    of 32 bits.
    """
    source = RandomSource.seeded(6)
    values = (source.uniform(length) * 2 - 1).astype(np.float32)
    lanes = lanes_of(neighbours)
    grids = {bits: Quantizer(value_bits=16, coordinate_bound=1.0, modulus_bits=bits) for bits in (32, 64)}
    secret = source.random_bytes(32)
    shares = shamir.split(secret, threshold=threshold, shares=dealers - 1, source=source)
    subset = {x: shares[x - 1] for x in range(1, threshold + 1)}
    waiting = {
        32: prepared_uploads(length, neighbours, modulus_bits=32, rounds=rounds),
        64: prepared_uploads(lanes.words(length), neighbours, modulus_bits=64, rounds=rounds),
    }

    def quantise(bits: int) -> Any:
        grid = grids[bits]
        return (
            grid.encode_lanes(values, lanes, source=source)
            if bits == 64
            else grid.encode(values, source=source)
        )

    def upload(bits: int) -> None:
        """Quantise and mask, with key agreement, opening of shares, packing, hash and signature."""
        session, delivery = waiting[bits].pop()
        session.mask(delivery, quantise(bits), update=NAME, model_hash=NAME)

    def recovery() -> None:
        shamir._weights.cache_clear()
        shamir.combine(subset)

    def dealing() -> None:
        for _ in range(2):
            shamir.split(secret, threshold=threshold, shares=dealers - 1, source=source)

    masks = [Mask(source.random_bytes(32)) for _ in range(neighbours + 1)]
    narrow, wide = np.zeros(lanes.words(length), dtype=np.uint64), np.zeros(length, dtype=np.uint32)
    return {
        "masks_alone": lambda: add_masks(narrow, masks),
        "masks_alone_without_lanes": lambda: add_masks(wide, masks),
        "quantising_alone": lambda: quantise(64),
        "client_upload": lambda: upload(64),
        "client_upload_without_lanes": lambda: upload(32),
        "share_dealing": dealing,
        "recovery_of_one_secret": recovery,
    }


def lanes_of(neighbours: int) -> Lanes:
    """Return the lanes for 16-bit values of a client and its neighbours."""
    return Lanes(bound=largest_sum(16, clients=neighbours + 1))


def prepared_uploads(
    length: int, neighbours: int, *, modulus_bits: int, rounds: int
) -> list[tuple[ClientSession, bytes]]:
    """Bring sessions up to the upload of one client."""
    everybody = neighbours + 1
    parameters, policy, people, source = gather(
        everybody,
        length,
        mode="active",
        modulus_bits=modulus_bits,
        survivors=everybody,
        neighbours=None,
        threshold=None,
    )
    uploads = []
    for number in range(rounds):
        fresh = [Identity(person.seed(), guard=ReplayGuard.in_memory()) for person in people]
        clients = [
            ClientSession(person, parameters, policy, source.derive(number, person.id.hex()), now=0)
            for person in fresh
        ]
        server = ServerSession(parameters)
        for one in clients:
            server.receive_advertisement(one.advertise())
        for one in clients:
            server.receive_shares(one.share(server.roster_message()))
        uploads.append((clients[0], server.delivery_for(clients[0].id)))
    return uploads


def measure_peer(python: str, length: int, neighbours: int, repeats: int) -> dict[str, Any]:
    """Let the peer's functions and ours do the same work in turn.

    A client's round is its upload and everything around it: keys, adverts and their checks, dealing,
    encrypting and decrypting shares, and our confirmation and answer. What does not depend on the length is
    taken from a short session.
    """
    dealers, threshold = 50, 34
    around = measure_session(neighbours + 1, 1000, 0)
    work = our_work(length, neighbours, dealers, threshold, repeats)
    ours: dict[str, list[float]] = {name: [] for name in work}
    theirs: dict[str, list[float]] = {}
    facts: dict[str, Any] = {}
    arguments = [str(value) for value in (length, neighbours, dealers, threshold, around["threshold"])]
    for _ in range(repeats):
        for name, act in work.items():
            ours[name].append(cpu_seconds(act))
        output = subprocess.run(
            [python, str(PEER_WORKER), *arguments],
            check=True,
            capture_output=True,
            text=True,
            env={"PATH": ""},
        ).stdout
        facts = json.loads(output.splitlines()[-1])
        for name, seconds in facts["seconds"].items():
            theirs.setdefault(name, []).append(seconds)
    key_stages = sum(took for stage, took in around["client_stage_seconds"].items() if stage != "mask")
    ours["key_stages"] = [key_stages] * repeats
    for sums in (ours, theirs):
        for suffix in ("", "_without_lanes"):
            if uploads := sums.get(f"client_upload{suffix}"):
                sums[f"client_round{suffix}"] = [
                    one + other for one, other in zip(uploads, sums["key_stages"], strict=True)
                ]
    rows = {}
    for name, times in ours.items():
        other = theirs[name.removesuffix("_without_lanes")]
        pairs = [one / own for one, own in zip(other, times, strict=True)]
        rows[name] = {
            "ours_seconds": min(times), "peer_seconds": min(other), "peer_over_ours": min(other) / min(times),
            "peer_over_ours_median": statistics.median(pairs),
        }  # fmt: skip
    lanes = lanes_of(neighbours)
    return {
        "peer": facts["peer"],
        "length": length,
        "neighbours": neighbours,
        "shares": dealers,
        "threshold": threshold,
        "value_bits": 16,
        "lanes": lanes.count,
        "lane_bits": lanes.width,
        "work": rows,
        "bytes_per_parameter": {
            "ours": 8 * lanes.words(length) / length,
            "ours_without_lanes": 4.0,
            "peer": facts["bytes_per_parameter"],
        },
        "share_message_bytes": {"ours": 86, "peer": facts["share_message_bytes"]},
    }


# Output


def machine() -> dict[str, Any]:
    """Describe the machine and versions."""
    with open("/proc/cpuinfo") as lines:
        model = next(
            (line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown"
        )
    return {
        "cpu": model, "python": platform.python_version(), "numpy": np.__version__,
        "cryptography": cryptography.__version__,
    }  # fmt: skip


def show(results: dict[str, Any]) -> None:
    """Print the tables."""
    for row in results["masking"]:
        print(
            f"mask {row['length']:>11,} uint32, {row['neighbours']:>3} neighbours: "
            f"{row['masking_seconds'] * 1e3:7.1f} ms, {row['masking_gigabytes_per_second']:.2f} GB/s; "
            f"keystream alone {row['keystream_gigabytes_per_second']:.2f} GB/s; share "
            f"{row['share_of_keystream_rate']:.0%} (median of pairs {row['share_median_of_pairs']:.0%})"
        )
    for row in results["sessions"]:
        print(
            f"{row['clients']:>5} clients, k = {row['neighbours']}, t = {row['threshold']}, "
            f"{row['length']:,} parameters, {row['lost']} lost: client {row['client_seconds']:.3f} s "
            f"(slowest {row['client_seconds_slowest']:.3f}), server {row['server_seconds']:.2f} s; up "
            f"{row['bytes_up']:,} bytes of which control {row['control_bytes_up']:,} "
            f"({row['control_bytes_up_stated']:,} stated), down {row['bytes_down']:,}"
        )
    if "side_by_side" in results:
        peer = results["side_by_side"]
        print(f"beside {peer['peer']}: {peer['length']:,} parameters, {peer['neighbours']} neighbours")
        for name, row in peer["work"].items():
            print(
                f"  {name.replace('_', ' '):28} ours {row['ours_seconds'] * 1e3:9.2f} ms   peer "
                f"{row['peer_seconds'] * 1e3:9.2f} ms   x{row['peer_over_ours']:.1f} (median of pairs "
                f"x{row['peer_over_ours_median']:.1f})"
            )
        print(
            f"  bytes per parameter: {peer['bytes_per_parameter']}; per share message: "
            f"{peer['share_message_bytes']}"
        )


def main() -> None:
    """Run the measurements and print table and JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, for a smoke test")
    parser.add_argument("--large", action="store_true", help="add 1,000 clients on a ring")
    parser.add_argument(
        "--peer", metavar="PYTHON", help="interpreter of an environment with Flower installed"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    length, repeats = (200_000, 2) if options.quick else (10_000_000, 7)
    results: dict[str, Any] = {"benchmark": "secagg", "quick": options.quick, "machine": machine()}
    results["masking"] = [
        measure_masking(length, neighbours, repeats) for neighbours in (10, 100)[: 1 + (not options.quick)]
    ]
    if options.quick:
        results["sessions"] = [measure_session(10, 10_000, 2)]
    else:
        results["sessions"] = [measure_session(10, 10_000_000, 1), measure_session(100, 1_000_000, 10)]
    if options.large:
        results["sessions"].append(measure_session(1000, 10_000, 100, neighbours=142, threshold=101))
    if options.peer:
        results["side_by_side"] = measure_peer(options.peer, length, 10, 2 if options.quick else 5)
    show(results)
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
