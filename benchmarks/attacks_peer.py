"""Run inverting gradients of this package and of breaching 0.1.2 on the same gradients, each in its own environment.

The parent draws pictures, takes gradients of one small network and runs our attack; the same file, run by the other
environment's Python, rebuilds the network from the stored weights and runs breaching's. Both are timed by their own
processes' CPU clocks without start-up, take the same number of iterations, and know labels and shape.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ITERATIONS = 1_000


def network(classes: int = 10) -> nn.Module:
    """Return a ReLU network of three convolutions and a linear head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, classes),
    ).eval()  # fmt: skip


def crops(count: int, side: int, seed: int) -> Tensor:
    """Return natural pictures (count, 3, side, side): random squares of two photographs, reduced by area."""
    from sklearn.datasets import load_sample_images

    generator = torch.Generator().manual_seed(seed)
    photographs = [torch.tensor(photo).permute(2, 0, 1).float() / 255 for photo in load_sample_images().images]
    found = []
    for index in range(count):
        photo = photographs[index % len(photographs)]
        size = int(torch.randint(96, 256, (1,), generator=generator))
        top, left = (int(torch.randint(0, photo.shape[axis] - size, (1,), generator=generator)) for axis in (1, 2))
        square = photo[:, top : top + size, left : left + size]
        found.append(nn.functional.interpolate(square[None], size=(side, side), mode="area")[0])
    return torch.stack(found)


def quality(images: Tensor, truth: Tensor) -> float:
    """Return the mean PSNR in dB after the best one-to-one matching, pixels in [0, 1]."""
    from scipy.optimize import linear_sum_assignment

    errors = torch.cdist(images.flatten(1).double(), truth.flatten(1).double()).square() / truth[0].numel()
    table = -10 * torch.log10(errors.clamp_min(1e-20))
    rows, columns = linear_sum_assignment(-table.numpy())
    return float(table[rows, columns].mean())


def ours(case: dict[str, Tensor], name: str, iterations: int) -> tuple[Tensor, float]:
    """Run one of our attacks; return images and CPU seconds."""
    from attacks import Budget, Knowledge, Observation, Prior
    from attacks.registry import build

    gradients = {key.removeprefix("gradient."): value for key, value in case.items() if key.startswith("gradient.")}
    labels, images = case["labels"], case["images"]
    known = Knowledge(labels=tuple(labels.tolist()), image_shape=tuple(images.shape[1:]), batch_size=len(labels))
    seen = Observation(kind="gradient", tensors=gradients, knowledge=known)
    budget = Budget(seconds=600.0, iterations=iterations, restarts=1)
    found = build(name).run(seen, network(), Prior(), budget, 0)
    return torch.stack(found.of("image")), found.seconds


def theirs(case: dict[str, Tensor], iterations: int) -> tuple[Tensor, float]:
    """Run breaching's inverting gradients with its own settings; only the number of iterations is set."""
    for schema in ("nms(Tensor dets, Tensor scores, float threshold) -> Tensor",
                   "qnms(Tensor dets, Tensor scores, float threshold) -> Tensor"):  # fmt: skip
        _libraries.append(torch.library.Library("torchvision", "FRAGMENT"))
        _libraries[-1].define(schema)
    import breaching  # type: ignore[import-not-found]
    from omegaconf import OmegaConf

    config = breaching.get_attack_config("invertinggradients")
    config.optim.max_iterations = iterations
    model, shape = network(), list(case["images"].shape[1:])
    attacker = breaching.attacks.prepare_attack(
        model, nn.CrossEntropyLoss(), config, {"device": torch.device("cpu"), "dtype": torch.float32}
    )
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
    payload = [{"parameters": list(model.parameters()), "buffers": list(model.buffers()), "metadata": metadata}]
    began = time.process_time()
    found, _ = attacker.reconstruct(payload, shared, {}, dryrun=False)
    return found["data"].detach(), time.process_time() - began


_libraries: list[Any] = []


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
    """Run every case by all three, one after another, and print a line for each."""
    cases = [(1, 8)] if quick else [(batch, side) for side in (8, 16, 32) for batch in (1, 2, 4)]
    iterations, seeds = (100, 1) if quick else (ITERATIONS, 5)
    rows: list[dict[str, Any]] = []
    print(
        f"{'batch':>5} {'side':>4} {'seed':>4} {'breaching dB':>13} {'s':>6} {'ours dB':>8} {'s':>6} {'modern dB':>9} {'s':>6}"
    )
    for batch, side in cases:
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as place:
                case = stored_case(Path(place), batch, side, seed)
                command = [str(python), str(Path(__file__)), place, str(iterations)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                return {"error": done.stderr.strip().splitlines()[-1:], "cases": rows}
            row = {"batch": batch, "side": side, "seed": seed, "peer": json.loads(done.stdout.splitlines()[-1])}
            for name in ("inverting_gradients", "modern_inversion"):
                images, seconds = ours(case, name, iterations)
                row[name] = {"psnr": quality(images, case["images"]), "seconds": seconds}
            rows.append(row)
            cells = (row[name] for name in ("peer", "inverting_gradients", "modern_inversion"))
            shown = " ".join(f"{one['psnr']:10.2f} {one['seconds']:6.1f}" for one in cells)
            print(f"{batch:5} {side:4} {seed:4} {shown}", flush=True)
    return {"iterations": iterations, "cases": rows, "won": sum(_won(row) for row in rows), "of": len(rows)}


def _won(row: dict[str, Any]) -> bool:
    best = max(row["inverting_gradients"]["psnr"], row["modern_inversion"]["psnr"])
    return bool(math.isfinite(best) and best >= row["peer"]["psnr"])


def main() -> None:
    """Run breaching's attack on a stored case and print one JSON object."""
    torch.set_num_threads(1)
    case = load_file(Path(sys.argv[1]) / "case.safetensors")
    images, seconds = theirs(case, int(sys.argv[2]))
    print(json.dumps({"psnr": quality(images.clamp(0, 1), case["images"]), "seconds": seconds}))


if __name__ == "__main__":
    main()
