"""Byte-pair encoding (Sennrich et al., arXiv 1508.07909): learning the pairs, and joining them in a piece of text."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from itertools import pairwise


def learn_merges(
    counts: Counter[bytes], first_id: int, rounds: int, progress: Callable[[float], object]
) -> list[tuple[int, int]]:
    """Returns the pairs that are joined into the ids first_id, first_id + 1 ..., from words and their counts.

    A round costs as much as its pair has occurrences.
    """
    chain = Chain(counts)
    heap = [(-count, pair) for pair, count in chain.pairs.items()]
    heapq.heapify(heap)
    merges: list[tuple[int, int]] = []
    while heap and len(merges) < rounds:
        count, pair = heapq.heappop(heap)
        if chain.pairs[pair] != -count:  # stale, because another entry holds the new count
            continue
        if -count < 2:
            break
        for changed in chain.join(pair, first_id + len(merges)):
            if chain.pairs[changed] > 0:
                heapq.heappush(heap, (-chain.pairs[changed], changed))
        merges.append(pair)
        progress(len(merges) / rounds)
    return merges


class Chain:
    """All words as one doubly linked list of ids, with the counts and places of all pairs of neighbours."""

    def __init__(self, counts: Counter[bytes]) -> None:
        self.ids, self.weights = [-1], [0]  # -1 stands between words
        for word, weight in counts.items():
            self.ids += [*word, -1]
            self.weights += [weight] * (len(word) + 1)
        self.before, self.after = list(range(-1, len(self.ids) - 1)), list(range(1, len(self.ids) + 1))
        self.pairs: Counter[tuple[int, int]] = Counter()
        self.places: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        for i, pair in enumerate(pairwise(self.ids)):
            self._count(pair, i, self.weights[i])

    def _count(self, pair: tuple[int, int], place: int, weight: int) -> None:
        if min(pair) >= 0:
            self.pairs[pair] += weight
            if weight > 0:
                self.places[pair].append(place)

    def join(self, pair: tuple[int, int], joined: int) -> set[tuple[int, int]]:
        """Replaces the pair by the id `joined`, from the left; returns the pairs whose counts have changed."""
        ids, before, after, changed = self.ids, self.before, self.after, set()
        for i in sorted(self.places.pop(pair)):
            j = after[i]
            if (ids[i], ids[j]) != pair:  # overlapped with the one before
                continue
            h, k, weight = before[i], after[j], self.weights[i]
            for old, new, place in (((ids[h], ids[i]), (ids[h], joined), h), ((ids[j], ids[k]), (joined, ids[k]), i)):
                self._count(old, place, -weight)
                self._count(new, place, weight)
                changed |= {old, new}
            ids[i], ids[j], after[i], before[k] = joined, -2, k, i
        del self.pairs[pair]
        return changed


def join(piece: bytes, rank: Mapping[tuple[int, int], int]) -> list[int]:
    """Returns the ids of a piece; `rank` gives each learned pair's id. The pair learned first is joined first."""
    ids = list(piece)
    before, after = list(range(-1, len(ids) - 1)), list(range(1, len(ids) + 1))
    heap = [(rank[pair], i) for i, pair in enumerate(pairwise(ids)) if pair in rank]
    heapq.heapify(heap)
    while heap:
        joined, i = heapq.heappop(heap)
        j = after[i]
        if j >= len(ids) or rank.get((ids[i], ids[j])) != joined:  # one of the two was joined meanwhile
            continue
        ids[i], ids[j], after[i] = joined, -1, after[j]
        h, k = before[i], after[i]
        if k < len(ids):
            before[k] = i
            if (joined, ids[k]) in rank:
                heapq.heappush(heap, (rank[joined, ids[k]], i))
        if h >= 0 and (ids[h], joined) in rank:
            heapq.heappush(heap, (rank[ids[h], joined], h))
    return [i for i in ids if i >= 0]
