"""What the compiled ops are made of: a hash, so that a library of older sources is told from one of these.

Without torch and without another module of the package, because setup.py runs this file to compile the hash in.
"""

import hashlib
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "csrc"
"""There in a checkout; an installation has only the library."""


def hash_of_sources() -> str:
    """A hash of the names and contents of all sources of the compiled ops; "" where there are none."""
    files = sorted(file for file in SOURCES.glob("*/*") if file.suffix in (".h", ".cuh", ".cpp", ".cu"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16] if files else ""
