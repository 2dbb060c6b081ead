"""Documents that are too long for any block, cut to fit."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from megatron_ext.planning.plan import Pack, Plan, Slice


def split_documents(lengths: Sequence[int], most: int) -> list[Slice]:
    """Cut documents of more than ``most`` tokens into as few nearly equal parts as fit; the others stay whole.

    A part does not see those before it: what was one context becomes several.
    """
    parts = []
    for document, length in enumerate(lengths):
        count = max(1, -(-length // most))
        cuts = [length * number // count for number in range(count + 1)]
        parts += [Slice(document, start, stop) for start, stop in pairwise(cuts)]
    return parts


def in_documents(plan: Plan, parts: Sequence[Slice]) -> Plan:
    """A plan that was made of ``parts`` as if each were a document, in terms of the documents that they are parts of."""

    def original(piece: Slice) -> Slice:
        part = parts[piece.document]
        return Slice(part.document, part.start + piece.start, part.start + piece.stop)

    def converted(pack: Pack) -> Pack:
        return replace(pack, slices=tuple(original(piece) for piece in pack.slices))

    return replace(plan, packs=tuple(converted(pack) for pack in plan.packs))
