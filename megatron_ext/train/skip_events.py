"""What a run says of a step that it skipped, and of going back."""

from collections.abc import Sequence
from typing import Any

from megatron_ext.data.corpus import Piece
from megatron_ext.train.data_events import DataEvent
from megatron_ext.train.ledger import FOLDER, Ledger
from megatron_ext.train.step_guard import BadStep

MOST_PIECES = 256
"""An event of more pieces of documents names the file that has them."""


def skip_event(bad: BadStep, ledger: Ledger, pieces: Sequence[Piece]) -> DataEvent:
    """Of a step whose update was left out, with the documents that it read, in the form of the ledger."""
    few = len(pieces) <= MOST_PIECES
    documents = {"documents": ledger.documents(pieces)} if few else {"documents_in": f"{FOLDER}/{ledger.path_of(bad.step).name}"}
    fields = {"reasons": bad.reasons, "loss": bad.loss, "grad_norm": bad.grad_norm, "limits": bad.limits, "pieces": len(pieces)}
    return DataEvent("skip", {**fields, "step_tokens": sum(map(len, pieces)), **documents}, f"update skipped: {bad}")


def rollback_event(number: int, steps: tuple[int, int], tokens: tuple[int, int], causes: list[dict[str, Any]]) -> DataEvent:
    """Of the return number ``number`` (from 0 on) to the first of ``steps`` from the second; ``tokens`` trained on at each."""
    (step, last), (before, after) = steps, tokens
    fields = {
        "number": number,
        "first_step": step + 1,
        "last_step": last,
        "first_token": before,
        "end_token": after,
        "causes": causes,
        "documents_in": FOLDER,
    }
    skipped = ", ".join(str(cause["step"]) for cause in causes)
    message = f"the run goes on from here, back from step {last} (skipped: {skipped}); it passes over the {after - before:,} tokens between"
    return DataEvent("rollback", fields, message)
