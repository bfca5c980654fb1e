"""Write the software bill of materials of the lock, as CycloneDX 1.6 JSON: what is pinned, and nothing else.

    python requirements/make_sbom.py OUT.json

Guarantee: the same lock gives the same bytes; no index is asked and nothing that is installed is looked at.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tomllib
import uuid
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements" / "constraints.txt"
HASHED = ROOT / "requirements" / "minilm.txt"
NAME, VERSION, DIGEST = r"(?P<name>[A-Za-z0-9._-]+)", r"(?P<version>[^\s;]+)", r"(?P<digest>[0-9a-f]{64})"
PIN = re.compile(rf"{NAME}=={VERSION}(?:\s+--hash=sha256:{DIGEST})?")


def component(line: str) -> dict[str, object]:
    """Describe one pinned distribution.

    Raises:
      ValueError: the line pins none.
    """
    match = PIN.match(line)
    if match is None:
        raise ValueError(f"{line!r}: pins no version")
    name = re.sub(r"[-_.]+", "-", match["name"]).lower()
    purl = f"pkg:pypi/{name}@{match['version']}"
    described: dict[str, object] = {
        "type": "library",
        "bom-ref": purl,
        "name": name,
        "version": match["version"],
        "purl": purl,
    }
    if match["digest"]:
        described["hashes"] = [{"alg": "SHA-256", "content": match["digest"]}]
    return described


def bill(version: str, pins: list[str]) -> dict[str, object]:
    """Return the bill of a release and its pins."""
    own = f"pkg:pypi/ffm-secure@{version}"
    components = sorted((component(line) for line in pins), key=lambda one: str(one["bom-ref"]))
    digest = hashlib.sha256("\n".join(sorted(pins)).encode()).digest()
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.UUID(bytes=digest[:16], version=4)}",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": own,
                "name": "ffm-secure",
                "version": version,
                "purl": own,
                "licenses": [{"license": {"id": "Apache-2.0"}}],
            },
        },
        "components": components,
    }


def pins() -> list[str]:
    """Return every pinned line of the lock."""
    lines = [line.strip() for path in (LOCK, HASHED) for line in path.read_text().splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def main() -> None:
    """Write the bill."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    out = Path(sys.argv[1])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(bill(project["version"], pins()), indent=1) + "\n")
    print(f"{out}: {len(pins())} pinned packages")


if __name__ == "__main__":
    main()
