"""The models of a zoo: their versions, which is active, and whether what they name is there and fits."""

import contextlib
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

from jblock.blocks.spec_json import canonical_json
from jblock.zoo import checks, codec, registry
from jblock.zoo.objects import Objects, check_hash
from jblock.zoo.pointer import Model, check_alias
from jblock.zoo.records import Chain, DamagedError, NotFoundError, ZooError, check_name
from jblock.zoo.storage import Changes

FORMAT = 2
READ_FORMATS = (1, 2)


class Models(Objects):
    """The models of a zoo, and the objects that they name."""

    def models(self) -> list[str]:
        """Names under chains/, of models with an active version or without, sorted."""
        return registry.models(self.storage)

    def chains(self) -> list[str]:
        """Names of the models that have an active version, sorted; one that cannot be read is left out."""
        found = []
        for name in self.models():
            with contextlib.suppress(ZooError):
                if registry.read(self.storage, name).active is not None:
                    found.append(name)
        return found

    def model(self, name: str) -> Model:
        """The pointer of a model: its versions, which of them is active, its aliases and its history.

        Raises:
          NotFoundError: there never was one.
          ZooError: it cannot be read.
        """
        model = registry.read(self.storage, name)
        if model.next == 1:
            known = ", ".join(self.chains()) or "none"
            raise NotFoundError(f"no model {name!r} in {self.storage.location}; known: {known}")
        return model

    def versions(self, name: str) -> list[int]:
        """Versions of a model, oldest first; empty when there is none."""
        return sorted(registry.read(self.storage, name).versions)

    def chain(self, name: str, version: int | str | None = None) -> Chain:
        """One version of a model, by default the active one.

        Args:
          name: of the model, or NAME@VERSION.
          version: its number, or an alias; None: the active one.

        Raises:
          NotFoundError: no such model or version (the known ones are named).
          ZooError: a damaged record.
        """
        if version is None and "@" in name:
            name, _, version = name.partition("@")
        model = registry.read(self.storage, name)
        number: int | None = None
        with contextlib.suppress(NotFoundError):
            number = model.active if version is None else registry.resolve(model, str(version))
        if number is None:
            raise self._unknown(model, version)
        try:
            return registry.chain(self.storage, model, number)
        except NotFoundError:
            # Another process may remove it at any moment; what is still listed is lost.
            model = registry.read(self.storage, name)
            if number in model.versions:
                raise DamagedError(
                    f"{self.storage.location}/{registry.path_of(name, number)} is missing: the zoo is "
                    "damaged; run fsck"
                ) from None
            raise self._unknown(model, version) from None

    def checked_chain(self, name: str, version: int | str | None = None) -> Chain:
        """One version of a model that is about to be worked with: read as `chain` does, and checked as
        `check_chain` does."""
        chain = self.chain(name, version)
        self.check_chain(chain)
        return chain

    def active(self, name: str) -> int:
        """The active version of a model.

        Raises:
          NotFoundError: there is none.
          ZooError: its record is damaged.
        """
        model = registry.read(self.storage, name)
        if model.active is None:
            raise self._unknown(model, None)
        return model.active

    def activate(self, name: str, version: int | str) -> Model:
        """Makes a version of a model the active one; returns the model as it is then.

        Raises:
          NotFoundError: no such model or version.
        """
        chain = self.chain(name, version)
        self.check_chain(chain)
        with self.changing(f"activating {name}@{version}") as changes:
            model = registry.completed(self.storage, self.model(name))
            if chain.version not in model.versions:
                raise self._unknown(model, version)
            if model.active == chain.version:
                return model
            return registry.activate(changes, model, chain.version)

    def rollback(self, name: str) -> Model:
        """Makes the version active that was so before; returns the model as it is then.

        Raises:
          NotFoundError: no such model, or no earlier active version is left.
        """
        with self.changing(f"rolling {name} back") as changes:
            model = registry.completed(self.storage, self.model(name))
            version = model.before()
            if version is None:
                raise NotFoundError(
                    f"{name} had no other active version that is still there: activate one of "
                    f"{', '.join(map(str, sorted(model.versions))) or 'none'}"
                )
            self.check_chain(registry.chain(self.storage, model, version))
            return registry.activate(changes, model, version, "rollback")

    def alias(self, name: str, alias: str, version: int | str | None) -> Model:
        """Lets NAME@ALIAS stand for a version; None takes the alias away.

        Raises:
          NotFoundError: no such model, version or alias.
        """
        check_alias(alias)
        with self.changing(f"naming a version of {name}") as changes:
            model = registry.completed(self.storage, self.model(name))
            if version is None and alias not in model.aliases:
                raise _unknown_alias(model, alias)
            number = None if version is None else registry.resolve(model, str(version))
            return registry.alias(changes, model, alias, number)

    def _unknown(self, model: Model, version: int | str | None) -> NotFoundError:
        where = self.storage.location
        if version is None and model.versions:
            known = ", ".join(map(str, sorted(model.versions)))
            return NotFoundError(
                f"model {model.name!r} in {where} has no active version, but {known}: 'jblock convert "
                f"activate {model.name}@{max(model.versions)}' makes one active"
            )
        if version is not None and model.versions:
            return registry.unknown_version(model, str(version))
        what = model.name if version is None else f"{model.name}@{version}"
        known = ", ".join(self.chains()) or "none"
        return NotFoundError(f"no model {what!r} in {where}; known: {known}")

    def check_chain(self, chain: Chain) -> None:
        """Checks that everything a chain names is there and fits, and that its policy is not too narrow.

        Raises:
          ZooError: what is missing or does not fit.
        """
        check_name(chain.name)
        specs, deltas = [], []
        for step in chain.steps:
            spec = self.component(step.component).spec
            specs.append(spec)
            deltas.append([self.delta(id_).spec for id_ in step.deltas])
            for id_, delta in zip(step.deltas, deltas[-1], strict=True):
                record = self.delta(id_)
                if record.component != step.component:
                    raise DamagedError(
                        f"delta {id_} is for another component than {step.component}"
                    )
                shapes = {name: t.shape for name, t in record.tensors.items()}
                codec.check_shapes(f"delta {id_}", shapes, codec.shapes_of(delta, spec))
            for component, _ in self.component(step.component).refs.values():
                self.component(component)
        checks.check_steps(chain, specs, deltas)
        self._check_there(chain)

    def check_whole(self, chain: Chain) -> None:
        """Checks that the components which a chain says some of its steps are made up of are what these
        make: they are what its digest covers. Reads those steps' tensors.

        Raises:
          DamagedError: they make something else.
        """
        for index, id_ in chain.whole.items():
            step = chain.steps[int(index)]
            record = self.component(step.component)
            tensors = self.load_component(step.component)
            for delta in step.deltas:
                tensors |= self.load_delta(delta)
            header = codec.component_header(dataclasses.replace(record, refs={}))
            check_hash(id_, header, tensors)

    def _check_there(self, chain: Chain) -> None:
        wanted = {f"components/{s.component}" for s in chain.steps}
        wanted |= {f"deltas/{d}" for s in chain.steps for d in s.deltas}
        wanted |= {f"{kind}/{id_}" for kind, id_ in chain.folders}
        for name in sorted(wanted):
            kind, _, id_ = name.partition("/")
            codec.check_id(id_)
            if not self.storage.exists(name):
                raise NotFoundError(
                    f"{self.storage.location} has no {kind[:-1]} {id_}: it was removed or never added"
                )

    @contextmanager
    def changing(self, purpose: str) -> Iterator[Changes]:
        """Holds the exclusive lock of a zoo, which is of the newest format from then on.

        Raises:
          LockedError: another process holds it for longer than anybody waits.
        """
        with self.storage.exclusive(purpose) as changes:
            found = codec.parse_json(self.storage.read("zoo.json"), "zoo.json")
            if found.get("format") != FORMAT:
                changes.put("zoo.json", zoo_json())
            yield changes


def _unknown_alias(model: Model, alias: str) -> NotFoundError:
    """The error for an alias that a model does not have."""
    return NotFoundError(
        f"model {model.name} has no alias {alias!r}; known: {', '.join(sorted(model.aliases)) or 'none'}"
    )


def zoo_json() -> bytes:
    """The file that makes a folder a zoo."""
    return (canonical_json({"format": FORMAT}) + "\n").encode()
