"""Groups of questions that must not be on both sides of a split."""


class Groups:
    """Names joined into groups, a union-find. A group is named after the first of its names in alphabetical order, so
    its name does not depend on the order in which they were joined."""

    def __init__(self) -> None:
        self._parents: dict[str, str] = {}

    def name_of(self, name: str) -> str:
        """The name of the whole group that a name belongs to: the root of its tree."""
        parents = self._parents
        while parents.setdefault(name, name) != name:
            parents[name] = name = parents[parents[name]]  # each step halves the path, so later look-ups are fast
        return name

    def join(self, one: str, other: str) -> None:
        """Join the groups of two names."""
        first, second = sorted((self.name_of(one), self.name_of(other)))
        self._parents[second] = first
