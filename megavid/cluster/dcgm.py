"""What DCGM knows of a node's GPUs and nvidia-smi does not tell: failed repairs of memory, and XIDs of broken hardware.

Owns the fields and what they mean. Used where ``dcgmi`` is installed and its host engine runs; else it says nothing.
Written against DCGM's own field numbers and the table of ``dcgmi dmon``, and not run on a machine with DCGM.
"""

import shutil
import subprocess

FIELDS = {"230": "xid", "395": "row_remap_failure", "396": "row_remap_pending"}
"""Numbers of fields asked for (dcgm_fields.h), in this order."""
HARDWARE_XIDS = {
    48: "a double-bit memory error", 64: "rows of memory could not be remapped", 74: "an NVLink error",
    79: "it fell off the bus", 95: "an uncontained memory error", 119: "its GSP timed out", 120: "its GSP failed",
}  # fmt: skip
"""XIDs that tell of the GPU or its links; the others are mostly a program's own faults."""


def dcgm_troubles() -> tuple[str, ...]:
    """What DCGM complains of, a line each; nothing where there is no ``dcgmi`` or it has no host engine to ask."""
    command = shutil.which("dcgmi")
    if command is None:
        return ()
    query = [command, "dmon", "-e", ",".join(FIELDS), "-c", "1"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()  # no host engine: nvidia-smi has been asked already
    return tuple(words for line in answer.stdout.splitlines() for words in _words(line))


def _words(line: str) -> list[str]:
    """Of one row, ``GPU 0  0  0  N/A``; other rows are headings."""
    cells = line.split()
    if len(cells) != 2 + len(FIELDS) or cells[0] != "GPU":
        return []
    of = {name: int(cell) for name, cell in zip(FIELDS.values(), cells[2:], strict=True) if cell.isdecimal()}
    words = []
    if of.get("row_remap_failure"):
        words.append(f"GPU {cells[1]}: rows of memory could not be remapped; replace it")
    if of.get("row_remap_pending"):
        words.append(f"GPU {cells[1]}: rows of memory wait to be remapped; reset it")
    if of.get("xid") in HARDWARE_XIDS:
        words.append(f"GPU {cells[1]}: its last XID is {of['xid']}: {HARDWARE_XIDS[of['xid']]}")
    return words
