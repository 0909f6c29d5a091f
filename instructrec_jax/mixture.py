"""A prepared folder out of several prepared ones: ``data prepare`` of a config with a ``mixture``.

Items and users of the sets lie one after the other in one table each. Text features and tokeniser are fitted on all of them, so that
what catalogues share in words they share in the model; co-occurrence is counted in each set that trains, in columns of its own. The
sets' own records are what they were, with shifted numbers, in the shares that the weights ask for. A set of weight 0 has no example
and no co-occurrence: its items are known by their texts alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace

import numpy as np
from jaxtyping import Float

from instructrec_jax.config import Config
from instructrec_jax.data import features as feature_tables
from instructrec_jax.data import mixture, records, store, tokenizer
from instructrec_jax.data.mixture import Space
from instructrec_jax.data.schema import SplitData
from instructrec_jax.errors import ConfigError
from instructrec_jax.files import sha256, write_json
from instructrec_jax.instructions.example import InstructionExample
from instructrec_jax.prepare import FILES, TOKENIZER_SAMPLE, Prepared, Progress, Say, check_replaceable, encoded, load

_READ = 1024  # records that are read at one time


def mix(config: Config, say: Say, progress: Progress | None = None) -> Prepared:
    """Build the prepared folder of a mixture, replacing an older one of the same name.

    Raises:
        DataError: a set is not prepared, or not with the settings of its config.
        ConfigError: no set has a weight, or settings that the sets do not allow.
    """
    check_replaceable(config.prepared_dir)
    members, weights = config.members(), list(config.mixture.values())
    if min(weights) < 0 or not sum(weights):
        raise ConfigError(f"mixture: weights {weights}", remedy="at least one above 0, none below")
    prepared = [load(member) for member in members]
    parts = [p.data for p in prepared]
    sets = mixture.spaces([m.name for m in members], weights, parts, [p.users for p in prepared])
    counts = mixture.shares(weights, [p.num_records for p in prepared])
    sets = [
        replace(space, examples=count, statistics=p.manifest["statistics"])
        for space, count, p in zip(sets, counts, prepared, strict=True)
    ]
    data = mixture.joined(config.name, sets, parts)
    for space in sets:
        say(f"  {space.name}: {space.users[1] - space.users[0]:,} users, {space.items[1] - space.items[0]:,} items, "
            f"{space.examples:,} examples an epoch (share {space.weight / sum(weights):.0%})")  # fmt: skip
    with records.building(config.prepared_dir) as fresh:
        store.save_split(data, fresh / "data")
        say("  item and user features")
        np.save(fresh / "item_features.npy", _item_features(data, config, sets, say))
        users = mixture.joined_users(sets, [p.users for p in prepared])
        np.savez(fresh / "user_features.npz", names=np.asarray(users.names, str), index=users.index, value=users.value)
        examples = _Examples(sets, prepared, config, progress)
        if config.model.pretrained:
            from instructrec_jax.models.hf.fetch import resolve

            tokenizer.copy_pretrained(resolve(config.model.pretrained), fresh / "tokenizer")
        else:
            say("  tokeniser")
            tokenizer.train(_texts(data, examples), config.model.vocab_size, fresh / "tokenizer")
        written = records.write(
            examples,
            fresh / "records",
            config_hash=config.data_hash(),
            seed=config.instructions.seed,
            shard_records=config.instructions.shard_records,
        )
        say(f"  {written['records']:,} instruction examples in {len(written['shards'])} shard(s)")
        manifest = {
            "name": config.name,
            "config_hash": config.data_hash(),
            "statistics": store.statistics(data),
            "steps": [],
            "examples": dict(Counter({space.name: space.examples for space in sets})),
            "sets": [asdict(space) for space in sets],
            "files": {name: sha256(fresh / name) for name in FILES},
        }
        write_json(fresh / "manifest.json", manifest)
    return load(config)


class _Examples:
    """The records of all sets, as often as their shares ask for."""

    def __init__(self, sets: list[Space], prepared: list[Prepared], config: Config, progress: Progress | None):
        self._sets, self._prepared, self._seed, self._progress = sets, prepared, config.instructions.seed, progress
        self.expected = sum(space.examples for space in sets)

    def __call__(self) -> Iterator[InstructionExample]:
        return self._progress("  instructions", self.expected, self.every(1)) if self._progress else self.every(1)

    def every(self, step: int) -> Iterator[InstructionExample]:
        """Each ``step``-th example of every set."""
        for number, (space, prepared) in enumerate(zip(self._sets, self._prepared)):
            if not space.examples:
                continue
            source = records.Records(prepared.records)
            chosen = mixture.drawn(space.examples, len(source), self._seed, number)[::step]
            for start in range(0, len(chosen), _READ):
                for example in source.__getitems__(chosen[start : start + _READ].tolist()):
                    yield mixture.shifted(example, space)


def _texts(data: SplitData, examples: _Examples) -> Iterator[str]:
    yield from data.catalogue.titles
    yield from (tag for _, _, tag in data.tags)
    for example in examples.every(max(1, examples.expected // TOKENIZER_SAMPLE)):
        yield example.prompt
        if example.answer:
            yield example.answer


def _item_features(data: SplitData, config: Config, sets: list[Space], say: Say) -> Float[np.ndarray, "I Fc"]:
    vectors = encoded(data, config, say) if config.model.text_encoder else None
    blocks = [feature_tables.item_features(data, config.model.content_features, 0, vectors)]
    for space in sets:
        if config.model.cooccurrence_features and space.weight:
            found = feature_tables.cooccurrence_features(mixture.own(data, space), config.model.cooccurrence_features)
            blocks.append(np.zeros((data.num_items, found.shape[1]), np.float32))
            blocks[-1][slice(*space.items)] = found
    return np.concatenate(blocks, axis=1)
