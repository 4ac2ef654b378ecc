"""Draft tokens for speculative decoding, taken from the text itself (prompt lookup decoding, Saxena 2023).

A step that verifies some tokens more costs little beside the weights that it reads anyway, and an edit copies most of
the code that it was shown. So what followed the last tokens where they stood before is drafted, and a pointer remembers
where the copy goes on: of several places that match equally well the one nearest to it is taken. How many tokens are
worth drafting follows from how many were right so far. Figures are in DECISIONS.md.

Not covered: drafts from another model, and several drafts for one place.
"""

from __future__ import annotations

from collections.abc import Sequence

_MAX_MATCH = 8
_MAX_PLACES = 256  # of one token; a longer list is looked through near the pointer and at its end only
_GROWTH = 4


class PromptLookup:
    """Drafts for one sequence. It is told every token that the sequence takes in and holds nothing of the drafts.

    Args:
        token_ids: The prompt.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._token_ids: list[int] = []
        self._places: dict[int, list[int]] = {}
        self._pointer: int | None = None
        self.extend(token_ids)
        self._pointer = None

    def extend(self, token_ids: Sequence[int]) -> None:
        """Take in tokens that follow; where they are the ones at the pointer, it goes with them."""
        for token_id in token_ids:
            self._places.setdefault(token_id, []).append(len(self._token_ids))
            self._token_ids.append(token_id)
            if self._pointer is not None:
                self._pointer += 1

    def draft(self, num_tokens: int, after: Sequence[int] = ()) -> list[int]:
        """What may come next.

        Args:
            num_tokens: Most tokens.
            after: Tokens that are drafted already, by a grammar for example; they count as the end of the text.

        Returns:
            The tokens; fewer, or none, where nothing like the end of the text stood before.
        """
        place = self._place([*self._token_ids[-_MAX_MATCH:], *after][-_MAX_MATCH:], is_ahead=bool(after))
        if place is None:
            return []
        self._pointer = place - len(after)
        ahead, num_known = list(after), len(self._token_ids)
        for index in range(place, place + num_tokens):  # a text that repeats itself goes on repeating
            ahead.append(self._token_ids[index] if index < num_known else ahead[index - num_known])
        return ahead[len(after) :]

    def _place(self, end: Sequence[int], *, is_ahead: bool) -> int | None:
        """Where a text goes on that ends like this: after the longest match, the nearest to the pointer."""
        best, best_key = None, (0, 0.0)
        for place in self._candidates(end[-1]):
            if place == len(self._token_ids) - 1 and not is_ahead:
                continue  # the end itself
            distance = -place if self._pointer is None else abs(place + 1 - self._pointer)
            key = (self._match_length(place, end), -float(distance))
            if key > best_key:
                best, best_key = place + 1, key
        return best

    def _candidates(self, token_id: int) -> Sequence[int]:
        places, pointer = self._places.get(token_id, ()), self._pointer
        if len(places) <= _MAX_PLACES:
            return places
        near = () if pointer is None else sorted(places, key=lambda place: abs(place - pointer))[: _MAX_PLACES // 2]
        return [*near, *places[-_MAX_PLACES // 2 :]]

    def _match_length(self, place: int, end: Sequence[int]) -> int:
        token_ids, length, most = self._token_ids, 1, min(len(end), place + 1)
        while length < most and token_ids[place - length] == end[-1 - length]:
            length += 1
        return length


class DraftLength:
    """How many tokens to draft: many while all are right, few after a wrong one.

    Args:
        least: Fewest; on a device where some rows more cost nothing, more than 1.
        most: Most.
    """

    def __init__(self, least: int, most: int) -> None:
        self._least = min(least, most)
        self._most = most
        self.num_tokens = max(self._least, most // 2)

    def learn(self, num_drafted: int, num_accepted: int) -> None:
        """Take in how one draft went."""
        if num_drafted and num_accepted == num_drafted:
            self.num_tokens = min(self._most, max(1, self.num_tokens) * _GROWTH)
        elif num_drafted:
            self.num_tokens = max(self._least, self.num_tokens // 2, num_accepted)
