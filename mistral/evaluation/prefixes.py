"""Which tokens of a batch of sequences are run once: a radix tree of their common prefixes, and batches made of it."""

import dataclasses
from collections.abc import Sequence

# A shorter common prefix costs more as a pass of its own than it saves.
SHARED = 8


@dataclasses.dataclass
class Node:
    """A run of tokens that all sequences below it share.

    Attributes:
        start, end: its positions in each of them.
        members: the sequences that pass through it; the tokens are `sequences[members[0]][start:end]`.
        children: runs that follow.
    """

    start: int
    end: int
    members: list[int]
    children: list["Node"] = dataclasses.field(default_factory=list)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the common prefix."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def tree(sequences: Sequence[Sequence[int]], order: Sequence[int], start: int = 0, look: int = 0) -> list[Node]:
    """The runs that begin at `start`.

    Args:
        sequences: all, none empty.
        order: those that are meant, in lexicographic order; they agree before `look`.
        start, look: where the runs begin, and from where on the sequences may differ.

    Returns:
        Nodes; together their paths cover every sequence. Prefixes of fewer than SHARED tokens are not shared.
    """
    found: list[Node] = []
    at = 0
    while at < len(order):
        key = sequences[order[at]][look : look + 1]
        stop = next((j for j in range(at, len(order)) if sequences[order[j]][look : look + 1] != key), len(order))
        group, at = list(order[at:stop]), stop
        first, last = sequences[group[0]], sequences[group[-1]]
        end = common(first, last)
        if end == len(first) == len(last):
            if start < end:
                found.append(Node(start, end, group))
        elif end - start >= SHARED:
            found.append(Node(start, end, group, tree(sequences, group, end, end)))
        else:
            found += tree(sequences, group, start, end)
    return found


def batches(sequences: Sequence[Sequence[int]], rows: int, cells: int) -> list[list[int]]:
    """Cuts sequences into batches, each in lexicographic order: those of a common prefix stay together.

    Families of a common prefix are taken by length, the longest first, so that a batch wastes little of a cache.

    Args:
        sequences: all, none empty.
        rows: different sequences in a batch, at most.
        cells: the most that different sequences times the longest may be; a batch has at least one sequence.
    """
    order = sorted(range(len(sequences)), key=lambda i: list(sequences[i]))
    families: list[list[int]] = []
    for i in order:
        if families and common(sequences[families[-1][-1]], sequences[i]) >= min(SHARED, len(sequences[i])):
            families[-1].append(i)
        else:
            families.append([i])
    families.sort(key=lambda family: -max(len(sequences[i]) for i in family))
    found: list[list[int]] = []
    distinct, longest = 0, 0
    for i in [i for family in families for i in family]:
        batch = found[-1] if found else []
        new = not batch or sequences[batch[-1]] != sequences[i]
        longer = max(longest, len(sequences[i]))
        if not batch or (new and (distinct + 1 > rows or (distinct + 1) * longer > cells)):
            found.append([i])
            distinct, longest = 1, len(sequences[i])
        else:
            batch.append(i)
            distinct, longest = distinct + new, longer
    for batch in found:
        batch.sort(key=lambda i: list(sequences[i]))
    return found
