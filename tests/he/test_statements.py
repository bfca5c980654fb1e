"""What runs without TenSEAL or openfhe, and what the plan and the report say."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from defenses.errors import ParameterError
from defenses.he import available, choose, describe
from defenses.he.collusion import collusion
from defenses.he.threshold import open_threshold, threshold_available

WITHOUT = """
import sys
sys.modules["tenseal"] = None
import numpy as np
from defenses import he
from defenses.errors import ParameterError
from defenses.random_source import RandomSource
import defenses.he.threshold, defenses.he.collusion
usable, reason = he.available()
assert not usable and "ffm-secure[he]" in reason, reason
parameters = he.choose("bfv", parties=3, value_bound=100)
assert he.lint(parameters, parties=3, value_bound=100, length=5) == []
me = bytes([2]) * 32
terms = he.Agreement(run=bytes(16), round=0, length=5, value_bound=100, cohort=(me,), fewest=1)
server = he.WordAccumulator(terms, "plain")
client = he.PlainClient(terms, me)
server.add(client.encrypt(np.arange(5)), sender=me)
assert client.decrypt_sum(server.sum_chunks(), [me]).tolist() == [0, 1, 2, 3, 4]
for action in (
    lambda: he.KeyHolder.generate(parameters, random=RandomSource.system()),
    lambda: he.Accumulator(he.wire.encode_parameters(parameters), terms, roster=[me]),
):
    try:
        action()
    except ParameterError as error:
        assert "pip install" in str(error)
    else:
        raise AssertionError("ran without TenSEAL")
"""


def test_everything_else_works_without_tenseal():
    subprocess.run([sys.executable, "-c", WITHOUT], check=True, cwd=Path(__file__).parents[2])


def test_tenseal_is_imported_in_one_module_only():
    room = Path(__file__).parents[2] / "defenses"
    importing = [path.name for path in room.rglob("*.py") if "import tenseal" in path.read_text()]
    assert importing == ["engines.py"]
    if available()[0]:
        assert available()[1].startswith("TenSEAL ")


def test_threshold_refuses_with_a_reason_where_openfhe_does_not_import():
    usable, reason = threshold_available()
    if usable:
        pytest.skip("openfhe imports here")
    assert "openfhe" in reason
    assert "secagg" in reason
    with pytest.raises(ParameterError, match="one Python version only"):
        open_threshold("openfhe", plain_bits=40)
    with pytest.raises(ParameterError, match="'helib' is unknown"):
        open_threshold("helib", plain_bits=40)


def test_openfhe_opens_three_party_sums_where_it_imports():
    if not threshold_available()[0]:
        pytest.skip("openfhe does not import here")
    import numpy as np

    parties = [open_threshold("openfhe", plain_bits=40) for _ in range(3)]
    joint = None
    for party in parties:
        joint = party.share_key(joint)
    vectors = np.random.default_rng(0).integers(-(2**15), 2**15, (3, 20_000))
    server = open_threshold("openfhe", plain_bits=40)
    total = server.add([party.encrypt(vector, joint) for party, vector in zip(parties, vectors)])
    partials = [party.partial(total, lead=index == 0) for index, party in enumerate(parties)]
    np.testing.assert_array_equal(server.fuse(partials, 20_000), vectors.sum(0))


@pytest.mark.parametrize("kind", ["plain", "masking", "bfv", "ckks", "threshold"])
def test_every_backend_states_who_can_decrypt_and_what_breaks_it(kind):
    statement = collusion(kind, parties=10, fewest=4, tolerated=2)
    texts = dataclasses.asdict(statement)
    assert texts.pop("backend") == kind
    assert all(text.endswith(".") and "{" not in text for text in texts.values())


def test_statements_carry_the_numbers_of_the_run():
    assert "any 1 of the 10 clients" in collusion("bfv", parties=10, fewest=4).broken_by
    assert "3 or more clients" in collusion("masking", parties=10, fewest=4, tolerated=2).broken_by
    with pytest.raises(ParameterError, match="unknown"):
        collusion("rot13", parties=10, fewest=4)
    with pytest.raises(ParameterError, match="impossible"):
        collusion("bfv", parties=3, fewest=4)


def test_descriptions_print_the_error_bound():
    assert (
        "error at most 0." in describe(choose("ckks", parties=10, value_bound=100), parties=10)["exactness"]
    )
    assert (
        "exact with certainty"
        in describe(choose("bfv", parties=10, value_bound=100), parties=10)["exactness"]
    )


def test_the_example_of_the_documentation_runs():
    pytest.importorskip("tenseal")
    text = (Path(__file__).parents[2] / "docs" / "he.md").read_text()
    example = text.split("```python\n")[1].split("```")[0]
    exec(compile(example, "docs/he.md", "exec"), {})  # noqa: S102
