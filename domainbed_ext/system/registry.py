"""Things of one kind by name: built-in ones, those that users register, and those of other packages' entry points."""

import importlib
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from domainbed_ext.errors import BenchmarkError, unknown, warn_once

T = TypeVar("T")

_PACKAGE = __name__.partition(".")[0]


class Registry(MutableMapping[str, T]):
    """Things of one kind by name; each is a class, or is about one.

    Built-in ones are imported at the first look, those of entry points when they are asked for. An entry point that
    cannot be imported is a warning, and an error only for who asks for it.

    Args:
        kind: Word for one thing, as errors have it, e.g. "algorithm".
        group: Entry point group by which other packages add theirs.
        built_in: Modules that register the built-in ones.
        make: Function that makes a thing from a name and a class.
        spellings: Function that gives the other names of a thing.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        built_in: Sequence[str],
        make: Callable[[str, Any], T],
        spellings: Callable[[T], Iterable[str]] = lambda thing: (),
    ) -> None:
        self.kind, self.group = kind, group
        self._make, self._spellings = make, spellings
        self._built_in = list(built_in)  # those that are not imported yet
        self._points: dict[str, EntryPoint] | None = None  # likewise
        self._things: dict[str, T] = {}
        self._owners: dict[str, str] = {}

    def register(self, name: str, thing: T, owner: str) -> None:
        """Adds a thing under a name of its own.

        Args:
            name: Name.
            thing: What is found under it.
            owner: Class that it is about, as "module:Class". Its name may be registered again, as notebooks do.

        Raises:
            BenchmarkError: The name cannot be one, or is taken.
        """
        if owner.partition(".")[0] != _PACKAGE:
            self._import_built_in()  # their names are taken, whoever comes first
        if not isinstance(name, str) or not name or set(name) & set("@,/\\ \t\n"):
            raise BenchmarkError(f"{name!r} cannot name {self._one}: give a word without spaces, commas, slashes and @")
        for each in (name, *self._spellings(thing)):
            holder = self._registered(each)
            if holder is not None and (holder, self._owners[holder]) != (name, owner):
                whose = f"{holder} ({self._owners[holder]})"
                raise BenchmarkError(f"{each!r} is {self._one} already, {whose}: give {owner} another name")
        self._things[name], self._owners[name] = thing, owner

    def canonical(self, name: str) -> str:
        """The name under which a thing is registered.

        Args:
            name: The same; or in other case, without hyphens; or another name of the thing.

        Raises:
            BenchmarkError: Unknown, naming the nearest; or of an entry point that cannot be imported.
        """
        self._import_built_in()
        known = self._registered(name)
        if known is None:
            if name in self._entry_points():
                self._import(name)
            else:
                self._import_all()  # an entry point may be a module that registers things under their own names
            known = self._registered(name)
        if known is None:
            synonyms = {other: each for each, thing in self._things.items() for other in self._spellings(thing)}
            raise unknown(self.kind, name, self, synonyms)
        return known

    def find(self, name: str) -> T:
        """What is registered under a name, or another spelling of it; raises what `canonical` does."""
        return self._things[self.canonical(name)]

    def registered(self) -> dict[str, T]:
        """What is registered by now, without what entry points would add."""
        self._import_built_in()
        return dict(self._things)

    def restore(self, things: dict[str, T]) -> None:
        """Goes back to what `registered` gave: what was added since is forgotten."""
        self._things = dict(things)
        self._owners = {name: owner for name, owner in self._owners.items() if name in things}

    def importable(self) -> Iterator[tuple[str, T]]:
        """All names and things, those of entry points too; what cannot be imported is left out with a warning."""
        self._import_built_in()
        self._import_all()
        yield from list(self._things.items())

    def __getitem__(self, name: str) -> T:
        self._import_built_in()
        if name not in self._things and name in self._entry_points():
            self._import(name)
        return self._things[name]

    def __setitem__(self, name: str, owner: Any) -> None:
        self._import_built_in()
        self._things[name], self._owners[name] = self._make(name, owner), path_of(owner)

    def __delitem__(self, name: str) -> None:
        self._import_built_in()
        del self._things[name], self._owners[name]

    def __contains__(self, name: object) -> bool:
        self._import_built_in()
        return name in self._things or name in self._entry_points()

    def __iter__(self) -> Iterator[str]:
        self._import_built_in()
        return iter(list(dict.fromkeys([*self._things, *self._entry_points()])))

    def __len__(self) -> int:
        return len(list(iter(self)))

    @property
    def _one(self) -> str:
        return f"{'an' if self.kind[0] in 'aeiou' else 'a'} {self.kind}"

    def _registered(self, name: str) -> str | None:
        """The name under which what is called so is registered by now."""
        if name in self._things:
            return name
        plain = _plain(name)
        return next((each for each, thing in self._things.items() if plain in map(_plain, self._names(each))), None)

    def _names(self, name: str) -> tuple[str, ...]:
        return name, *self._spellings(self._things[name])

    def _import_built_in(self) -> None:
        modules, self._built_in = self._built_in, []
        for module in modules:
            importlib.import_module(module)

    def _entry_points(self) -> dict[str, EntryPoint]:
        if self._points is None:
            self._points = {point.name: point for point in entry_points(group=self.group)}
        return self._points

    def _import(self, name: str) -> None:
        """Imports what an entry point names: a class, or a module that registers some."""
        point = self._entry_points()[name]
        try:
            found = point.load()
            if isinstance(found, type) and path_of(found) not in self._owners.values():
                self.register(name, self._make(name, found), path_of(found))
        except Exception as error:
            whose = point.dist.name if point.dist else point.value
            reason = str(error) if isinstance(error, BenchmarkError) else f"{type(error).__name__}: {error}"
            raise BenchmarkError(
                f"{self.kind} {name!r} of the package {whose} cannot be imported ({reason}): fix or uninstall it"
            ) from error
        del self._entry_points()[name]

    def _import_all(self) -> None:
        for name in list(self._entry_points()):
            try:
                self._import(name)
            except BenchmarkError as error:
                warn_once(str(error))


def path_of(owner: Any) -> str:
    """A class as "module:Class", which finds it again."""
    return f"{owner.__module__}:{owner.__qualname__}"


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter not in "-_ ")
