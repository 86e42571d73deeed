"""A process of a peer: `python -m benchmarks.peers MODULE:CLASS FOLDER MODE...`, run by the Python of its environment.

It makes the class of this folder and these modes, prints the package and its version, and then answers each line of its
input, a call like ["generate", ids, 64], by a line with {"result": ...} or {"error": ...}: all JSON. Nothing of this
library is imported but for the peers that are this library.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np


def serve(place: str, folder: str, *modes: str) -> None:
    """Answer calls until the input ends; whatever else is printed goes to stderr."""
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        peer = made(place, folder, *modes)
        print(json.dumps({"result": version(peer.package)}), file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(answered(peer, *json.loads(line))), file=answers, flush=True)


def made(place: str, folder: str, *modes: str) -> Any:
    """The peer that is the class of a module."""
    module, name = place.split(":")
    return getattr(importlib.import_module(f"benchmarks.peers.{module}"), name)(Path(folder), frozenset(modes))


def version(package: str) -> str:
    """A package and its version, as far as it is installed as one."""
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return package


def answered(peer: Any, call: str, *given: Any) -> dict[str, Any]:
    """What a call gives, or in one line why it cannot be."""
    try:
        return {"result": np.asarray(getattr(peer, call)(*given)).tolist()}
    except Exception as error:  # whatever a library raises: other calls may work
        words = " ".join(str(error).split())
        return {"error": f"{type(error).__name__}: {words[:200]}"}


if __name__ == "__main__":
    serve(*sys.argv[1:])
