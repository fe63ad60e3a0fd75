"""Which tokens of a batch of sequences are run once: a radix tree of their common prefixes."""

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


def packs(nodes: Sequence[Node], longest: Sequence[int], rows: int, cells: int) -> list[list[int]]:
    """Cuts nodes into groups that run together, those of like length, the longest first.

    Args:
        nodes: of one level.
        longest: of each node, the length of the longest sequence that passes through it.
        rows: nodes of a group, at most.
        cells: the most that nodes times the longest may be; a group has at least one node.

    Returns:
        Indices of nodes.
    """
    found: list[list[int]] = []
    for i in sorted(range(len(nodes)), key=lambda i: -longest[i]):
        # The first of a group is its longest.
        fits = found and len(found[-1]) < rows and (len(found[-1]) + 1) * longest[found[-1][0]] <= cells
        if fits:
            found[-1].append(i)
        else:
            found.append([i])
    return found
