"""The command line of the suite: list attacks, show one, run one on an observation folder.

python -m attacks list
python -m attacks show span
python -m attacks run span --observation folder --model folder
python -m attacks.span --observation folder --model folder
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from attacks.answering import answer_itself, writes
from attacks.contract import Budget, Prior, Reconstruction
from attacks.facts import printable
from attacks.fitting import fit
from attacks.foreign import Tokenizer
from attacks.observation import ObservationError, load_observation
from attacks.registry import ATTACKS, TAXONOMY, build
from attacks.result_folder import Result, load_truth, result_of, score_json, write_result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(max(1, chosen.threads))
    if chosen.command == "list":
        print(f"{attack_table()}\n\n{taxonomy_table()}" if chosen.markdown else _names())
        return 0
    if chosen.command == "show":
        print(description(chosen.attack))
        return 0
    return _run(chosen.attack, chosen, parser)


def run_one(name: str, arguments: Sequence[str] | None = None) -> int:
    """Run the command line of one attack and return its exit code."""
    parser = argparse.ArgumentParser(
        prog=f"python -m attacks.{name}",
        description=description(name),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _run_options(parser)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(max(1, chosen.threads))
    return _run(name, chosen, parser)


def description(name: str) -> str:
    """Say what an attack recovers, what it needs, and which published attacks it stands for."""
    attack = build(name)
    published = []
    for entry in TAXONOMY:
        if entry.where == name:
            published.append(f"{entry.name} ({entry.source}), {entry.status}")
    lines = [f"{attack.name} ({attack.family})", getattr(attack, "summary", "")]
    return "\n".join(
        [*lines, f"needs: {', '.join(attack.requires)}", *(f"published: {line}" for line in published)]
    )


def _run(name: str, chosen: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    try:
        model = None
        if chosen.model is not None:
            model = load_model(chosen.model, adapter=chosen.adapter)
        if model is None and chosen.adapter is not None:
            raise ValueError("--adapter needs --model, the model it adapts")
        fitted = fit(load_observation(chosen.observation), model)
        candidates = None
        if chosen.candidates is not None:
            candidates = load_file(str(chosen.candidates))
        truth = None
        if chosen.truth is not None:
            truth = load_truth(chosen.truth)
    except (ObservationError, SafetensorError, OSError, ValueError) as error:
        parser.exit(2, f"attacks: {printable(str(error))}\n")
    prior = Prior(candidates=candidates)
    budget = Budget.named(chosen.budget)
    reconstruction = build(name).run(fitted.observation, model, prior, budget, chosen.seed)
    result = result_of(reconstruction, fitted.notes, truth)
    numbers = as_json(reconstruction) | {"notes": list(result.notes), "score": score_json(result.score)}
    if chosen.out is not None:
        try:
            _write(result, chosen.out, numbers, chosen.model)
        except OSError as error:
            parser.exit(2, f"attacks: {printable(str(error))}\n")
    print(json.dumps(numbers, indent=None if chosen.json else 2))
    return 0


def _write(result: Result, out: Path, numbers: dict[str, object], model: Path | None) -> None:
    decode = None
    shift: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    if model is not None:
        tokenizer = load_tokenizer(model)
        shift, scale = normalisation(model)
        if tokenizer is not None:
            decode = tokenizer.decode
    write_result(result, out, numbers=numbers, decode=decode, shift=shift, scale=scale)


def normalisation(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and deviation per channel that a model folder's preprocessor states, or nothing."""
    try:
        stated = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        shift, scale = (tuple(map(float, stated[key])) for key in ("image_mean", "image_std"))
    except (OSError, ValueError, KeyError, TypeError):
        return (), ()
    return shift, scale


def as_json(result: Reconstruction) -> dict[str, object]:
    """Return a reconstruction as plain JSON values; long values are written whole."""
    return {
        "format": 1,
        "attack": result.attack,
        "applicable": result.applicable,
        "reason": result.reason,
        "confidence": result.confidence,
        "seconds": round(result.seconds, 3),
        "knowledge_used": list(result.knowledge_used),
        "details": dict(result.details),
        "items": [
            {"kind": item.kind, "confidence": item.confidence, "value": item.value.tolist()}
            for item in result.items
        ],
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars and advice of transformers: an audit's own words are few."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def load_model(folder: Path, *, adapter: Path | None = None) -> nn.Module:
    """Load a model folder in the Hugging Face layout, from disk alone, with eager attention and safetensors
    weights.

    `adapter` is a folder as PEFT writes it, put on top of the model.

    Raises: OSError or ValueError when a folder does not hold one.
    """
    with _quiet():
        loaded = _loaded(folder)
        if adapter is not None:
            loaded = _adapted(loaded, adapter)
    for module in loaded.modules():  # a library says aloud that it takes its usual loss where none is named
        if getattr(module, "loss_type", "named") is None:
            module.loss_type = "ForCausalLM"  # type: ignore[assignment]
    return loaded.eval()


def _loaded(folder: Path) -> nn.Module:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    names = list(getattr(config, "architectures", None) or [])
    if len(names) != 1 or not hasattr(transformers, names[0]):
        raise ValueError(
            f"{folder}: config.json names the architectures {names}, exactly one known name is needed"
        )
    loaded = getattr(transformers, names[0]).from_pretrained(
        folder,
        local_files_only=True,
        use_safetensors=True,
        attn_implementation="eager",
        dtype=torch.float32,  # attacks solve equations; half precision cannot
    )
    if not isinstance(loaded, nn.Module):
        raise ValueError(f"{folder}: {names[0]} is not a model")
    return answer_itself(loaded) if writes(loaded) else loaded


def _adapted(model: nn.Module, folder: Path) -> nn.Module:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing: --adapter names a folder as PEFT writes it")
    import peft

    try:
        adapted = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=True, local_files_only=True)
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"{folder} does not fit the model: {lines[0]}") from None
    if not isinstance(adapted, nn.Module):
        raise ValueError(f"{folder} holds no adapter")
    return adapted


def taxonomy_table() -> str:
    """Return the table of published attacks in Markdown."""
    lines = ["| # | Attack | Source | Status | Here | Note |", "|---|---|---|---|---|---|"]
    for entry in TAXONOMY:
        where = ""
        if entry.where:
            where = f"`{entry.where}`"
        lines.append(
            f"| {entry.number} | {entry.name} | {entry.source} | {entry.status} | {where} | {entry.reason} |"
        )
    return "\n".join(lines)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of a model folder from disk alone, or return None when it holds none."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def attack_table() -> str:
    """Return the table of attacks that can be run, in Markdown."""
    lines = ["| Name | Family | What it recovers | Needs |", "|---|---|---|---|"]
    for name in sorted(ATTACKS):
        attack = build(name)
        needs = ", ".join(attack.requires)
        lines.append(f"| `{name}` | {attack.family} | {getattr(attack, 'summary', '')} | {needs} |")
    return "\n".join(lines)


def _names() -> str:
    built = []
    for name in sorted(ATTACKS):
        built.append(build(name))
    return "\n".join(
        f"{attack.name:<22} {attack.family:<14} {getattr(attack, 'summary', '')}" for attack in built
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m attacks", description="Attack what one observer saw of a round."
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of the tensor library")
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="name every attack")
    listing.add_argument("--markdown", action="store_true", help="the tables of docs/attacks.md instead")
    show = commands.add_parser("show", help="say what an attack does and needs")
    show.add_argument("attack", choices=sorted(ATTACKS))
    run = commands.add_parser("run", help="run one attack on an observation folder; prints JSON")
    run.add_argument("attack", choices=sorted(ATTACKS))
    _run_options(run, threads=False)
    return parser


def _run_options(run: argparse.ArgumentParser, *, threads: bool = True) -> None:
    if threads:
        run.add_argument("--threads", type=int, default=1, help="threads of the tensor library")
    run.add_argument(
        "--observation", required=True, type=Path, help="folder with observation.json and tensors"
    )
    run.add_argument("--model", type=Path, help="model folder (config.json and safetensors)")
    run.add_argument("--adapter", type=Path, help="adapter folder as PEFT writes it, on top of the model")
    run.add_argument("--truth", type=Path, help="safetensors file of what was trained on, to score by")
    run.add_argument("--out", type=Path, help="new folder for report.md, result.json and pictures")
    run.add_argument("--budget", choices=("quick", "standard", "exhaustive"), default="quick")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument(
        "--candidates", type=Path, help="safetensors file of candidates (token_ids or images, labels)"
    )
    run.add_argument("--json", action="store_true", help="one line of JSON")
