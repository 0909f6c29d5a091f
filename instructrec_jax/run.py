"""The assembly: rooms are wired together here, for the commands and for whoever uses the package as a library."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Int

from instructrec_jax import config as configs
from instructrec_jax import fit_memory as memories
from instructrec_jax import fit_new_items as new_items
from instructrec_jax import fit_words as wishes
from instructrec_jax import learnt_from, prepare
from instructrec_jax.config import Config
from instructrec_jax.data.loader import training_iterator
from instructrec_jax.data.mixture import Space
from instructrec_jax.data.schema import Cases
from instructrec_jax.errors import ConfigError, UserError
from instructrec_jax.files import path_of
from instructrec_jax.instructions.build import Builder
from instructrec_jax.instructions.example import InstructionExample
from instructrec_jax.models import adapters, architecture
from instructrec_jax.models.adapters import Tree
from instructrec_jax.models.architecture import Architecture
from instructrec_jax.models.item_start import begin_at_titles, check_item_start
from instructrec_jax.models.language_model import Sizes
from instructrec_jax.models.new_items import with_new_items
from instructrec_jax.models.sharding import RULES, check_divides, padded, put
from instructrec_jax.scoring import Scorer
from instructrec_jax.training import hosts
from instructrec_jax.training.checkpoint import METRIC, Checkpoints, check_writable
from instructrec_jax.training.goodput import Ledger
from instructrec_jax.training.loop import Finished, train
from instructrec_jax.training.mesh import data_slice, make_mesh
from instructrec_jax.training.step import init_model
from instructrec_jax.validation import Validation

Say = Callable[[str], None]


@dataclass(frozen=True)
class Session:
    """A config with its prepared data on a mesh. Make it with ``session`` and use it inside that ``with`` block."""

    config: Config
    prepared: prepare.Prepared
    builder: Builder
    arch: Architecture
    sizes: Sizes
    content: jax.Array
    model_folder: Path | None = None  # of the published model, if there is one
    run_dir: Path | None = None  # of the trained run, if it is one; of a mixture's set its folder in there
    space: Space | None = None  # of one set of a mixture: where it lies in the model's tables

    def sets(self) -> list[Session]:
        """One session for each set of a mixture, over its own items and users; another config is its own only set."""
        if not self.prepared.sets:
            return [self]
        return [
            dataclasses.replace(
                self,
                config=config,
                prepared=prepared,
                builder=prepared.builder(config),
                run_dir=self.run_dir and set_dir(self.run_dir, space),
                space=space,
            )
            for config, prepared, space in prepare.each_set(self.config, self.prepared)
        ]

    def one_set(self, name: str = "") -> Session:
        """The session of a set by its name; "" where there is only one.

        Raises:
            UserError: there is no such set, or there are several and no name is given.
        """
        return self.sets()[prepare.number_of(self.config, self.prepared, name)]

    @property
    def learnt(self) -> Int[np.ndarray, " I"]:
        """Training events of every item that training shows: none of a set of weight 0."""
        popularity = self.prepared.data.train_popularity.copy()
        for space in self.prepared.sets:
            if not space.weight:
                popularity[slice(*space.items)] = 0
        return popularity

    def start(self) -> tuple[Tree, Tree]:
        """(trained, frozen) at step 0: fresh, or the published model with a fresh adapter and item tokens."""
        base = None
        if self.model_folder is not None:
            from instructrec_jax.models.hf.load import load_params

            o = self.config.model
            base = load_params(self.model_folder, self.arch, o.param_dtype, quantised=o.quantise, sizes=self.sizes)
        trained, frozen = init_model(self.config, self.arch, self.sizes, self.content, self.config.train.seed, base)
        if base and self.config.model.item_start == "titles":
            ids = map(self.prepared.text.ids, self.prepared.data.catalogue.titles)
            begin_at_titles(trained["params"], base["words"], list(ids))
        return trained, frozen

    @property
    def by_items(self) -> bool:
        """Whether validation ranks the whole catalogue with the item head (else 1+9 candidates by likelihood)."""
        method = self.config.train.eval_method
        return bool(self.sizes.items) if method == "auto" else method == "items"

    def scorer(
        self,
        params: Any,
        *,
        batch_size: int | None = None,
        between: Callable[[], None] = lambda: None,
        memory: Literal["all", "train", "none"] = "all",
        words: bool = True,
    ) -> Scorer:
        """A scorer of this data set with given parameters.

        Args:
            params: the model's variables.
            batch_size: most prompts in one device batch; None = ``evaluate.batch_size``.
            between: called between device batches.
            memory: which of the run's item memories counts, if it has them: that of all known events, of training events, or none.
            words: whether the words of a wish count, if they do in the run.
        """
        data, links, match = self.prepared.data, None, None
        if self.run_dir is not None and memory != "none":
            links = memories.load_memory(self.config, self.run_dir, memory, data.num_items)
        if self.run_dir is not None and words:
            match = wishes.load_words(self, self.run_dir)
        return Scorer(
            self.config.model,
            self.arch,
            self.sizes,
            params,
            self.content,
            data.num_items,
            self.prepared.text,
            data.catalogue.titles,
            batch_size=batch_size or self.config.evaluate.batch_size,
            language=self.language,
            space=self.space,
            between=between,
            memory=links,
            words=match,
        )

    def sequential_prompts(self, cases: Cases) -> list[InstructionExample]:
        """The next-item prompt of every case."""
        return self.prompts("sequential", cases)

    def prompts(self, kind: str, cases: Cases) -> list[InstructionExample]:
        """The prompt of a kind (see ``instructions/prompts.py``) of every case."""
        return [
            self.builder.evaluation_prompt(kind, int(u), int(e), language=self.language)
            for u, e in zip(cases.user, cases.end)
        ]

    @property
    def language(self) -> str:
        """Language of evaluation prompts: the first that was trained."""
        return self.config.instructions.languages[0]


@contextlib.contextmanager
def session(config: Config) -> Iterator[Session]:
    """Load the prepared data of a config and put it on the mesh of all devices.

    Raises:
        DataError: the data is not prepared.
        ConfigError: the mesh does not fit the devices.
    """
    adapters.check(config.model)
    check_item_start(config.model)
    parts = [config.member(number) for number in range(len(config.mixture) or 1)]
    for part in parts:
        _check_answers(part)
    prepared = prepare.load(config)
    folder = None
    if config.model.pretrained:
        from instructrec_jax.models.hf.fetch import resolve
        from instructrec_jax.models.hf.load import check_tokenizer, read_config

        folder = resolve(config.model.pretrained)
        arch = read_config(folder)
        if arch.kind == "encoder":
            raise UserError(
                f"{folder} is an encoder: it reads texts, but answers nothing",
                remedy="use it for item features (model.text_encoder), and a decoder or encoder-decoder as model.pretrained",
            )
        check_tokenizer(prepared.text.vocab_size, arch, folder)
        for part in parts:
            _check_encoder_decoder(part, arch)
        vocab = padded(arch.vocab)
    else:
        vocab = padded(prepared.text.vocab_size)
        arch = architecture.from_numbers(config.model, vocab)
    with jax.set_mesh(make_mesh(config.mesh)) as _:
        mesh = jax.sharding.get_mesh()
        features = prepared.item_features
        rows = padded(prepared.data.num_items)
        content = np.zeros((rows, features.shape[1]), np.float32)
        content[: len(features)] = features
        sizes = Sizes(vocab)
        if config.model.uses_items:
            users = padded(len(prepared.users.names), 64) if prepared.users.names else 0
            spaces = tuple(space.items[1] for space in prepared.sets)
            sizes = Sizes(vocab, rows, users, features.shape[1], spaces)
        check_divides(arch, mesh.shape, mesh.shape["replica"] * mesh.shape["fsdp"], sizes.tables)
        hosts.meet("with data")  # reading may take one much longer than another
        yield Session(
            config,
            prepared,
            prepared.builder(config),
            arch,
            sizes,
            put(content, jax.NamedSharding(mesh, RULES.table_used)),
            folder,
        )


def _check_answers(config: Config) -> None:
    """A model without an item head learns from answers in words alone."""
    if config.model.uses_items:
        return
    silent = [name for name in ("search", "profile") if getattr(config.instructions, name)]
    if config.instructions.items_as == "token":
        raise ConfigError(
            "instructions.items_as = token, but the model has no item tokens",
            remedy="instructions.items_as: title, or items in model.trainable",
        )
    if silent:
        raise ConfigError(
            f"instructions.{' and '.join(silent)} ask for an item, not for words, and the model has no item head",
            remedy=f"set {', '.join(f'instructions.{name}: 0' for name in silent)}, or items in model.trainable",
        )


def _check_encoder_decoder(config: Config, arch: Architecture) -> None:
    """Where an encoder reads the prompt, nothing inside it can be predicted: it has been seen."""
    i = config.instructions
    if arch.kind == "encoder-decoder" and (i.items_as != "title" or i.dense_titles):
        raise ConfigError(
            f"an encoder-decoder ({arch.family}) cannot learn at every item of a history",
            remedy="set instructions.items_as: title and instructions.dense_titles: false",
        )


def train_run(config: Config, run_dir: Path, say: Say) -> Finished:
    """Train (or resume) a run of a prepared config."""
    ledger = Ledger()
    with session(config) as s:
        if s.by_items and not s.sizes.items:
            raise ConfigError(
                "train.eval_method = items, but the model has no item head",
                remedy="likelihood or auto, or items in model.trainable",
            )
        learning = [part for part in s.sets() if part.space is None or part.space.weight]
        if config.model.item_memory.past:
            for part in learning:
                memories.check_memory(config.model.item_memory, s.by_items, part.prepared.data.num_items)
        wishes.check_words(config.model.wish_words, s.by_items)
        validations = [Validation(part) for part in learning if not part.config.data.split.learn_valid]
        learnt_from.check(run_dir, s.prepared)
        check_writable(run_dir, 0)
        if hosts.first():
            learnt_from.keep(run_dir, s.prepared)
        trained_params, frozen = s.start()

        def validate(params: Any, leave: Callable[[], None]) -> dict[str, float]:
            variables = with_new_items(adapters.join(params, frozen), s.learnt, config.model.new_item_lift or 0.0)
            found = [validation(variables, leave) for validation in validations]
            mean = {key: float(np.mean([values[key] for values in found])) for key in found[0]}
            if len(found) == 1:
                return mean
            names = [validation.session.config.name for validation in validations]
            return mean | {f"{METRIC}/{name}": values[METRIC] for name, values in zip(names, found)}

        index, count = data_slice(make_mesh(config.mesh))
        batches = training_iterator(
            s.prepared.records,
            s.prepared.text,
            batch_size=config.train.batch_size,
            sequence_length=config.train.sequence_length,
            seed=config.train.seed,
            curriculum=config.train.curriculum,
            look_ahead=config.train.look_ahead,
            process_index=index,
            process_count=count,
            say=hosts.voice(say),
        )
        try:
            finished = train(
                config,
                run_dir,
                batches=batches,
                content=s.content,
                arch=s.arch,
                sizes=s.sizes,
                trained=trained_params,
                frozen=frozen,
                num_items=s.prepared.data.num_items,
                popularity=s.learnt,
                validate=validate if validations else None,
                ledger=ledger,
                say=say,
            )
        finally:
            batches.close()
        if not finished.stopped:
            _fit_beside(s, learning, run_dir, hosts.voice(say))
        return finished


def _fit_beside(s: Session, learning: list[Session], run_dir: Path, say: Say) -> None:
    """What counts beside the matching head of a finished run, unless it is there: item memory, then words of a wish and new items."""
    o, wanted = s.config.model, []
    for part in learning:
        folder = set_dir(run_dir, part.space)
        if o.item_memory.past and not (folder / memories.CHOSEN).is_file():
            wanted.append((memories.fit_memory, part, folder))
        if o.wish_words.enabled and not (folder / wishes.CHOSEN).is_file():
            wanted.append((wishes.fit_words, part, folder))
        if new_items.wants_lift(part) and not (folder / new_items.CHOSEN).is_file():
            wanted.append((new_items.fit_new_items, part, folder))
    if wanted:
        params, _ = best_params(s, run_dir)
        for fit, part, folder in wanted:
            fit(part, params, folder, say)


def set_dir(run_dir: Path, space: Space | None) -> Path:
    """Where a run keeps what is of one data set, such as its item memory: in a mixture each set has a folder."""
    return run_dir / "sets" / space.name if space else run_dir


def best_params(s: Session, run_dir: Path) -> tuple[Any, int]:
    """The variables of a run's best checkpoint, and its step.

    Raises:
        UserError: there is no complete checkpoint yet.
    """
    config = s.config
    checkpoints = Checkpoints(run_dir / "checkpoints", config.train.keep)
    try:
        step = checkpoints.best()
        if step is None:
            raise UserError(f"{run_dir} has no complete checkpoint yet", remedy="run `instructrec train` on its config")
        trained_params, frozen = s.start()
        restored = checkpoints.restore_params(step, trained_params, ema=bool(config.train.ema))
        lift = new_items.load_lift(config, run_dir)
        return with_new_items(adapters.join(restored, frozen), s.learnt, lift), step
    finally:
        checkpoints.close()


@contextlib.contextmanager
def trained(run_dir: str | Path, overrides: tuple[str, ...] = ()) -> Iterator[tuple[Session, Any, int]]:
    """The session of a run, its variables (with the parameters of its best checkpoint), and that step.

    Raises:
        UserError: the folder is not a run, or has no complete checkpoint yet.
    """
    run_dir = path_of(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise UserError(
            f"{run_dir} is not a run: it has no config.yaml", remedy="give the folder that `instructrec train` printed"
        )
    config = configs.load(run_dir / "config.yaml", overrides)
    with session(config) as bare:
        learnt_from.check(run_dir, bare.prepared)
        s = dataclasses.replace(bare, run_dir=run_dir)
        params, step = best_params(s, run_dir)
        yield s, params, step
