"""A crash report that prints every local variable of every frame prints no row of a site,
and no vector before it is sealed.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

from defenses.errors import ProtocolError
from ffm_secure.data.dataset import Examples
from ffm_secure.data.table import Table
from ffm_secure.engines import simulation
from ffm_secure.protection.codec import VectorCodec
from ffm_secure.protection.masked import MaskedClientRound
from ffm_secure.site.private_frames import without_locals
from ffm_secure.site.trainer import SiteTrainer
from tests.federation.helpers import RECORD, SECAGG, finish, make, table

SECRET = "xanthippe"


def report(error: BaseException) -> str:
    """Return what a crash reporter with local variables stores of an error, with all it came from."""
    shown = traceback.TracebackException.from_exception(error, capture_locals=True, compact=False)
    return "".join(shown.format())


def simulated(folder: Path) -> simulation.Simulation:
    (folder / "rows").mkdir()
    for part in ("train", "validation"):
        word = SECRET if part == "train" else "public"
        rows = "".join(f"{word} number {number} is ill,{number % 2}\n" for number in range(60))
        (folder / "rows" / f"{part}.csv").write_text(f"text,label\n{rows}")
    config = make(
        task={
            **table()["task"],
            "kind": "text_classification",
            "data": str(folder / "rows"),
            "max_length": 8,
        },
        model={"name": "builtin:tiny-bert", "trainable": {"kind": "lora", "rank": 2}},
        privacy=RECORD,
        protection=SECAGG,
    )
    return simulation.build(simulation.prepare(config, folder), folder / "run")


def fail(*arguments: Any, **options: Any) -> Any:
    raise LookupError("the machine is full")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (SiteTrainer, "protect"),
        (VectorCodec, "quantise"),
        (MaskedClientRound, "seal"),
        (SiteTrainer, "learn"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_an_error_inside_a_site_shows_neither_rows_nor_vectors(
    owner: type, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = simulated(tmp_path)
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(LookupError) as caught:
        finish(ready, tmp_path / "run")
    shown = report(caught.value)
    assert "in fail" in shown, "where it arose stays to be seen"
    assert SECRET not in shown
    frames = [frame for frame, _ in traceback.walk_tb(caught.value.__traceback__)]
    names = [frame.f_code.co_name for frame in frames]
    assert [dict(frame.f_locals) for frame in frames[names.index("handle") :] if frame.f_locals] == []


def test_causes_are_cleared_with_the_error_they_led_to() -> None:
    def read() -> None:
        row = SECRET
        raise KeyError(len(row))

    @without_locals
    def work(vector: torch.Tensor) -> None:
        plain = vector + 1
        try:
            read()
        except KeyError:
            raise ProtocolError from None
        finally:
            del plain

    with pytest.raises(ProtocolError) as caught:
        work(torch.full((3,), 4242.0))
    shown = report(caught.value)
    assert "4242" not in shown.replace("torch.full((3,), 4242.0)", "")
    context = caught.value.__context__
    assert context is not None
    assert SECRET not in report(context).replace(f'row = "{SECRET}"', "")


def test_what_holds_rows_prints_none() -> None:
    columns = {"text": [SECRET], "label": [1]}
    assert SECRET not in repr(Examples(columns=columns))
    assert SECRET not in repr(Table(origin="file", columns=columns))
