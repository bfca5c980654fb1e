"""Run inverting gradients of this package and of breaching 0.1.2 on the same gradients, each in its own
environment.

The parent draws pictures, takes gradients of one small network and runs our attack; the same file, run by
the other environment's Python, rebuilds the network and runs breaching's with the settings its configuration
recommends. Both know labels and shape and are timed by their own process's CPU clock after a short warm-up.
The number of iterations is set for both: ours takes four fifths of the other's, because a step that sees
kinks costs more. The settings of ours were chosen on seeds from 100 on, the comparison runs on seeds 0 to 4.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ITERATIONS = 500
OUR_SHARE = 0.8
WARM_UP = (
    3  # iterations before the measured run, in both processes: imports and allocations are not the attack
)


def network(classes: int = 10) -> nn.Module:
    """Return a ReLU network of three convolutions and a linear head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, classes),
    ).eval()  # fmt: skip


def crops(count: int, side: int, seed: int, *, cut: tuple[int, int] = (96, 256)) -> Tensor:
    """Return natural pictures (count, 3, side, side): random squares of two photographs, reduced by area.

    `cut`: smallest and largest side of a square, in pixels of a photograph (427 x 640).
    """
    from sklearn.datasets import load_sample_images

    generator = torch.Generator().manual_seed(seed)
    photographs = [
        torch.tensor(photo).permute(2, 0, 1).float() / 255 for photo in load_sample_images().images
    ]
    pictures = []
    for index in range(count):
        photo = photographs[index % len(photographs)]
        size = int(torch.randint(*cut, (1,), generator=generator))
        top, left = (
            int(torch.randint(0, photo.shape[axis] - size, (1,), generator=generator)) for axis in (1, 2)
        )
        square = photo[:, top : top + size, left : left + size]
        pictures.append(nn.functional.interpolate(square[None], size=(side, side), mode="area")[0])
    return torch.stack(pictures)


def quality(images: Tensor, truth: Tensor) -> float:
    """Return the mean PSNR in dB after the best one-to-one matching, pixels in [0, 1]."""
    from scipy.optimize import linear_sum_assignment

    errors = torch.cdist(images.flatten(1).double(), truth.flatten(1).double()).square() / truth[0].numel()
    table = -10 * torch.log10(errors.clamp_min(1e-20))
    rows, columns = linear_sum_assignment(-table.numpy())
    return float(table[rows, columns].mean())


def ours(case: dict[str, Tensor], name: str, iterations: int, seed: int) -> tuple[Tensor, float]:
    """Run one of our attacks; return images and CPU seconds."""
    from attacks import Budget, Knowledge, Observation, Prior
    from attacks.registry import build

    gradients = {
        key.removeprefix("gradient."): value for key, value in case.items() if key.startswith("gradient.")
    }
    labels, images = case["labels"], case["images"]
    known = Knowledge(
        labels=tuple(labels.tolist()), image_shape=tuple(images.shape[1:]), batch_size=len(labels)
    )
    observation = Observation(kind="gradient", tensors=gradients, knowledge=known)
    for count in (WARM_UP, iterations):
        budget = Budget(steps=600_000, iterations=count, restarts=1)
        reconstruction = build(name).run(observation, network(), Prior(), budget, seed)
    return torch.stack(reconstruction.of("image")), reconstruction.seconds


def theirs(case: dict[str, Tensor], iterations: int, seed: int) -> tuple[Tensor, float]:
    """Run breaching's inverting gradients with its own settings; only the number of iterations is set."""
    _without_data_sets()
    import breaching
    from omegaconf import OmegaConf

    model, shape = network(), list(case["images"].shape[1:])
    metadata = OmegaConf.create(
        {
            "shape": shape,
            "classes": 10,
            "mean": [0.0] * 3,
            "std": [1.0] * 3,
            "modality": "vision",
            "task": "classification",
        }
    )
    gradients = [case[f"gradient.{name}"] for name, _ in model.named_parameters()]
    facts = {"num_data_points": len(case["labels"]), "labels": case["labels"], "local_hyperparams": None}
    shared = [{"gradients": gradients, "buffers": None, "metadata": facts}]
    payload = [
        {"parameters": list(model.parameters()), "buffers": list(model.buffers()), "metadata": metadata}
    ]
    for count in (WARM_UP, iterations):
        config = breaching.get_attack_config("invertinggradients")
        config.optim.max_iterations = count
        setup = {"device": torch.device("cpu"), "dtype": torch.float32}
        attacker = breaching.attacks.prepare_attack(model, nn.CrossEntropyLoss(), config, setup)
        torch.manual_seed(seed)
        began = time.process_time()
        reconstruction, _ = attacker.reconstruct(payload, shared, {}, dryrun=False)
        seconds = time.process_time() - began
    return reconstruction["data"].detach(), seconds


def _without_data_sets() -> None:
    """Let breaching be imported without torchvision and without its data sets, neither of which the attack
    uses.

    breaching imports torchvision, which has no build that loads beside a CPU torch here, for its data loaders
    and for saving pictures; empty modules stand in for both. The attack itself, its configuration and its
    losses are its own.
    """
    place = Path(str(find_spec("breaching").submodule_search_locations[0]))
    sys.modules["torchvision"] = ModuleType("torchvision")
    for name in ("cases", "cases.models"):
        empty = ModuleType(f"breaching.{name}")
        empty.__path__ = [str(place.joinpath(*name.split(".")))]
        sys.modules[f"breaching.{name}"] = empty
    sys.modules["breaching.cases"].construct_dataloader = None


def stored_case(folder: Path, batch: int, side: int, seed: int) -> dict[str, Tensor]:
    """Draw a case and write it to `folder`."""
    images, model = crops(batch, side, seed), network()
    labels = torch.randperm(10, generator=torch.Generator().manual_seed(seed))[:batch]
    loss = nn.functional.cross_entropy(model(images), labels)
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, list(named.values()))
    case = {f"gradient.{name}": grad for name, grad in zip(named, grads, strict=True)}
    case |= {"images": images, "labels": labels}
    save_file({name: value.contiguous() for name, value in case.items()}, folder / "case.safetensors")
    return case


def side_by_side(python: Path, *, quick: bool) -> dict[str, Any]:
    """Run every case by both, one after another, and print a line for each; sum up by batch and size."""
    cases = [(1, 8)] if quick else [(batch, side) for side in (8, 16, 32) for batch in (1, 2, 4)]
    iterations, seeds = (100, 1) if quick else (ITERATIONS, 5)
    rows: list[dict[str, Any]] = []
    print(f"{'batch':>5} {'side':>4} {'seed':>4} {'breaching dB':>13} {'s':>7} {'ours dB':>8} {'s':>7}")
    for seed in range(seeds):
        for batch, side in cases:
            row = _case(python, batch, side, seed, iterations)
            if "error" in row:
                return row | {"cases": rows}
            rows.append(row)
            peer, own = row["peer"], row["ours"]
            print(
                f"{batch:5} {side:4} {seed:4} {peer['psnr']:13.2f} {peer['seconds']:7.2f} "
                f"{own['psnr']:8.2f} {own['seconds']:7.2f}",
                flush=True,
            )
    settings = {"iterations": iterations, "our_iterations": int(OUR_SHARE * iterations), "seeds": seeds}
    return {**settings, "cases": rows, "summary": summary(rows)}


def _case(python: Path, batch: int, side: int, seed: int, iterations: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        case = stored_case(Path(place), batch, side, seed)
        command = [str(python), str(Path(__file__)), place, str(iterations), str(seed)]
        completed = subprocess.run(command, capture_output=True, text=True, check=False)
    if completed.returncode != 0:
        return {"error": completed.stderr.strip().splitlines()[-1:]}
    images, seconds = ours(case, "inverting_gradients", int(OUR_SHARE * iterations), seed)
    own = {"psnr": quality(images, case["images"]), "seconds": seconds}
    return {
        "batch": batch,
        "side": side,
        "seed": seed,
        "peer": json.loads(completed.stdout.splitlines()[-1]),
        "ours": own,
    }


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return per batch and size the means over seeds, in how many cases ours was at least as good and at most
    as slow.
    """
    lines = []
    print(
        f"\n{'batch':>5} {'side':>4} {'breaching dB':>13} {'s':>7} {'ours dB':>8} {'s':>7} "
        f"{'as good':>8} {'no slower':>9}"
    )
    for batch, side in dict.fromkeys((row["batch"], row["side"]) for row in rows):
        own = [row for row in rows if (row["batch"], row["side"]) == (batch, side)]
        means = {
            f"{who}_{what}": sum(row[who][what] for row in own) / len(own)
            for who in ("peer", "ours")
            for what in ("psnr", "seconds")
        }
        good = sum(row["ours"]["psnr"] >= row["peer"]["psnr"] for row in own)
        quick = sum(row["ours"]["seconds"] <= row["peer"]["seconds"] for row in own)
        lines.append(
            {"batch": batch, "side": side, **means, "as_good": good, "no_slower": quick, "of": len(own)}
        )
        print(
            f"{batch:5} {side:4} {means['peer_psnr']:13.2f} {means['peer_seconds']:7.2f} "
            f"{means['ours_psnr']:8.2f} {means['ours_seconds']:7.2f} {good:5}/{len(own)} "
            f"{quick:6}/{len(own)}"
        )
    return lines


def main() -> None:
    """Run breaching's attack on a stored case and print one JSON object."""
    torch.set_num_threads(1)
    case = load_file(Path(sys.argv[1]) / "case.safetensors")
    images, seconds = theirs(case, int(sys.argv[2]), int(sys.argv[3]))
    print(json.dumps({"psnr": quality(images.clamp(0, 1), case["images"]), "seconds": seconds}))


if __name__ == "__main__":
    main()
