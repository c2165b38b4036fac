"""A registry of things by name: built-in ones, users' own, and those of other packages' entry points."""

import importlib
from collections.abc import Callable, Collection, Iterable, Iterator, MutableMapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from domainbed_ext.errors import BenchmarkError, unknown, warn_once

T = TypeVar("T")

_PACKAGE = __name__.partition(".")[0]


class Declared:
    """A declaration of a class, which is imported when it is needed."""

    implementation: Any

    @property
    def path(self) -> str:
        """The class as "module:Class"."""
        return self.implementation if isinstance(self.implementation, str) else path_of(self.implementation)

    def load(self) -> Any:
        """Imports the class."""
        if not isinstance(self.implementation, str):
            return self.implementation
        module, _, name = self.implementation.partition(":")
        return getattr(importlib.import_module(module), name)


class Registry(MutableMapping[str, T]):
    """Things of one kind by name; each is a class or describes one.

    Built-in ones are imported at the first access, entry points when they are looked up. An entry point that cannot be
    imported is a warning, or an error if it was looked up by its name.

    Args:
        kind: Word for a thing in errors, e.g. "algorithm".
        group: Entry point group by which other packages add theirs.
        built_in: Modules that register the built-in ones.
        make: Function that makes a thing of a name and a class.
        spellings: Function that returns the other names of a thing.
        separators: Further characters that no name may have.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        built_in: Sequence[str],
        make: Callable[[str, Any], T],
        spellings: Callable[[T], Iterable[str]] = lambda thing: (),
        separators: Collection[str] = (),
    ) -> None:
        self.kind, self.group = kind, group
        self._separators = list(separators)
        self._make, self._spellings = make, spellings
        self._built_in = list(built_in)  # those that are not imported yet
        self._points: dict[str, EntryPoint] | None = None  # likewise
        self._things: dict[str, T] = {}
        self._owners: dict[str, str] = {}

    def register(self, name: str, thing: T, owner: str) -> None:
        """Adds a thing under a name of its own.

        Args:
            name: Name.
            thing: Thing of that name.
            owner: Class of the thing, as "module:Class", which may be registered again, e.g. from a notebook.

        Raises:
            BenchmarkError: The name cannot be one, or is taken.
        """
        if owner.partition(".")[0] != _PACKAGE:
            self._import_built_in()  # so that their names are taken, whatever is imported first
        if not isinstance(name, str) or not name or set(name) & {*"@,/\\ \t\n", *self._separators}:
            without = " and ".join([", ".join(["spaces", "commas", "slashes", *self._separators]), "@"])
            raise BenchmarkError(f"{name!r} cannot name {self._one}: give a word without {without}")
        for each in (name, *self._spellings(thing)):
            holder = self._registered(each)
            if holder is not None and (holder, self._owners[holder]) != (name, owner):
                whose = f"{holder} ({self._owners[holder]})"
                raise BenchmarkError(f"{each!r} is {self._one} already, {whose}: give {owner} another name")
        self._things[name], self._owners[name] = thing, owner

    def canonical(self, name: str) -> str:
        """Returns the name under which a thing is registered.

        Args:
            name: That name or another one of the thing. Case, hyphens and spaces do not count.

        Raises:
            BenchmarkError: The name is unknown, or of an entry point that cannot be imported.
        """
        self._import_built_in()
        registered = self._registered(name)
        if registered is None:
            if name in self._entry_points():
                self._import(name)
            else:
                self._import_all()  # an entry point may be a module that registers other names
            registered = self._registered(name)
        if registered is None:
            otherwise = ", or add --import with the file that registers your own"
            raise unknown(self.kind, name, self, self.synonyms(), otherwise)
        return registered

    def spelled(self, name: str) -> str | None:
        """Returns the name under which a thing is registered; None if there is none, entry points aside."""
        self._import_built_in()
        return self._registered(name)

    def find(self, name: str) -> T:
        """Returns the thing of a name; raises what `canonical` does."""
        return self._things[self.canonical(name)]

    def base_of(self, implementation: type) -> T | None:
        """Returns the thing of the nearest base class that has one."""
        self._import_built_in()
        names = {owner: name for name, owner in self._owners.items()}
        paths = map(path_of, implementation.__mro__[1:])
        return next((self._things[names[path]] for path in paths if path in names), None)

    def synonyms(self) -> dict[str, str]:
        """Returns the registered name of each other name."""
        return {other: name for name, thing in self.registered().items() for other in self._spellings(thing)}

    def registered(self) -> dict[str, T]:
        """Returns the registered things by name, without those of entry points that were not looked up."""
        self._import_built_in()
        return dict(self._things)

    def restore(self, things: dict[str, T]) -> None:
        """Restores what `registered` returned."""
        self._things = dict(things)
        self._owners = {name: owner for name, owner in self._owners.items() if name in things}

    def importable(self) -> Iterator[tuple[str, T]]:
        """Yields all names and things, with those of entry points; prints a warning for what cannot be imported."""
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
        """The registered name for a spelling; None if there is none yet."""
        if name in self._things:
            return name
        plain = _plain(name)
        return next((each for each, thing in self._things.items() if plain in map(_plain, self._names(each))), None)

    def _module(self, name: str) -> str:
        return self._owners[name].partition(":")[0]

    def _names(self, name: str) -> tuple[str, ...]:
        return name, *self._spellings(self._things[name])

    def _import_built_in(self) -> None:
        modules, self._built_in = self._built_in, []
        for module in modules:
            importlib.import_module(module)
        if modules:  # listed in their order, whichever was imported first
            places = {module: place for place, module in enumerate(modules)}
            self._things = dict(sorted(self._things.items(), key=lambda item: places.get(self._module(item[0]), -1)))

    def _entry_points(self) -> dict[str, EntryPoint]:
        if self._points is None:
            self._points = {point.name: point for point in entry_points(group=self.group)}
        return self._points

    def _import(self, name: str) -> None:
        """Imports an entry point: a class, or a module that registers some."""
        point = self._entry_points()[name]
        try:
            target = point.load()
            if isinstance(target, type) and path_of(target) not in self._owners.values():
                self.register(name, self._make(name, target), path_of(target))
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
    """Returns a class as "module:Class"."""
    return f"{owner.__module__}:{owner.__qualname__}"


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter not in "-_ ")
