"""What can be set, section by section, with defaults, units and meanings. How it is read, overridden and hashed: ``config.py``.

This module imports neither JAX nor anything slow.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

# ---------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class CleanConfig:
    """What is dropped before anything else happens. Every rule reports its counts before and after."""

    duplicates: Literal["keep", "first", "last"] = "last"  # repeated (user, item) pairs; "keep" = repeats are events
    min_rating: float | None = None  # drop interactions rated below; None keeps all
    k_core: int = 5  # repeat until every user and item has this many interactions; 0 = off
    min_user_events: int = 3  # users with fewer events are dropped and counted (leave-one-out needs 3)
    html: bool = True  # strip HTML and unfold list-like text ("['a', 'b']") in item text columns
    # Personal data in item text (not titles), tags and user features: none, our patterns (e-mail, card, phone, address), or presidio.
    scrub: Literal["none", "patterns", "presidio"] = "none"
    unknown_item: Literal["error", "drop", "title-less"] = "error"  # interaction with an item that items lack
    bad_row: Literal["error", "drop"] = "error"  # unparsable row


@dataclass(frozen=True)
class SplitConfig:
    """How events become train, valid and test. See ``data/splits.py`` for the exact rules."""

    kind: Literal["leave-one-out", "last-n", "global-time", "cold-items"] = "leave-one-out"
    n: int = 1  # last-n: this many test events per user, and as many valid events before them
    valid_fraction: float = 0.1  # global-time: share of events (by time) for valid
    test_fraction: float = 0.1  # global-time: share of events (by time) for test
    cold_fraction: float = 0.1  # cold-items: share of the items that are kept from training
    tie: Literal["hash", "input"] = "hash"  # order of equal timestamps: keyed hash of (user, item), or row order
    seed: int = 0  # key of the tie hash
    # Validation events are training events too, and nothing is left to validate on: what `instructrec refit` trains on
    learn_valid: bool = False


@dataclass(frozen=True)
class DataConfig:
    """Where the logs and the catalogue are, and how they are cleaned and split."""

    source: Literal["embedded", "tables", "recbole", "movielens"] = "embedded"
    path: str = "ml-latest-small"  # embedded: data set name; otherwise a folder
    interactions: str = ""  # tables: file names inside path; "" = look for interactions.{csv,csv.gz,parquet}
    items: str = ""
    users: str = ""  # optional
    tags: str = ""  # optional: users' own words (user_id, item_id, tag[, timestamp])
    columns: dict[str, str] = field(default_factory=dict)  # our column name -> the file's column name
    list_columns: tuple[str, ...] = ("genres", "categories")  # text columns that hold lists
    list_separator: str = "|"
    clean: CleanConfig = CleanConfig()
    split: SplitConfig = SplitConfig()
    domain: str = "films"  # noun pack of the templates: films, games, products, ... (docs/templates.md)
    # Name of the environment variable that holds the secret for keyed hashes of user ids; "" = ids as they are.
    hash_ids: str = ""


@dataclass(frozen=True)
class InstructionConfig:
    """Which instructions are written, and how many."""

    languages: tuple[str, ...] = ("en",)
    history_items: int = 64  # most items of a history in one prompt (the newest are kept)
    # The same for prompts with one target (search, rerank, ...): they cost a row for one loss
    short_history_items: int = 16
    repeat_targets: bool = True  # items in the overlap of two windows are targets in both, with two lengths of context
    candidates: int = 10  # candidates of a T3 prompt, the target included
    # How the other items of T0, T1 and T3 training prompts are drawn
    negatives: Literal["uniform", "popularity", "file"] = "uniform"
    # file: lists of a retriever, as `evaluate --recommendations` reads them; hard negatives are drawn from the first 100 of a list
    negatives_file: str = ""
    # Most windows of a user (the newest), and most targets of a user in each other family; 0 = no limit
    max_per_user: int = 0
    copies: int = 1  # renderings of every sequential window, each with another wording
    items_as: Literal["token", "title", "both"] = "token"  # how items stand in prompts: soft tokens, words, or both
    # Pauses of an hour or more between events, and before the request, as feature tokens of a history (logs with timestamps)
    time_gaps: bool = False
    dense_titles: bool = True  # items_as title: all titles of a history carry loss, not only the answer
    # Weights of the task families relative to sequential = one window of history. 0 = none.
    search: float = 1.0  # (P0|P1, I1|I2, T2): find the item from words
    rerank: float = 0.25  # (P1|P2, I0, T3)
    pointwise: float = 0.1  # (P1, I0, T0)
    describe: float = 0.5  # (P1, I0, T2) answered in words: the title of the next item
    profile: float = 0.1  # (P0|P2, I0, T2): no history, taste in words or nothing known
    rerank_more: float = 0.0  # (P1|P2, I1|I2, T3): the candidates by taste and wish
    pointwise_more: float = 0.0  # (P0|P1|P2, I1|I2, T0) and (P2, I0, T0)
    describe_more: float = 0.0  # (P0|P1|P2, I1|I2, T2) and (P0, I0, T2), answered in words
    pairwise: float = 0.0  # (P0|P1|P2, I0|I1|I2, T1): which of two
    # Widenings, for training only: their prompts and answers are never measured.
    turn_around: float = 0.0  # from the item or the history to the wish or the taste
    relatedness: float = 0.0  # from a wish and its item to the history, from the history to the next wish and its item
    reasoning: float = 0.0  # first the taste in words, then the item
    # Families of templates to train on, by the beginnings of their ids or whole ids: seq, search.p0, seq.p1.a. () = all. What
    # is measured does not change.
    families: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()  # further template files (YAML), behind the built-in ones
    packs: tuple[str, ...] = ()  # further files of domain packs (YAML), for data.domain
    seed: int = 0
    shard_records: int = 50_000
    teacher: str = ""  # folder that `data teach` wrote: its texts stand in place of rule-made words; "" = rules alone


# --------------------------------------------------------------------------------------------------------------- model


PROJECTIONS = ("query", "key", "value", "output", "gate", "up", "down")


@dataclass(frozen=True)
class AdapterConfig:
    """A low-rank adapter beside frozen weights: y = x W + scale · (x A) B."""

    rank: int = 0  # R; 0 = no adapter
    alpha: float = 16.0  # scale = alpha / rank, or alpha / sqrt(rank) for rslora
    kind: Literal["lora", "rslora", "dora"] = "lora"
    dropout: float = 0.0  # on the adapter's input
    targets: tuple[str, ...] = PROJECTIONS  # which projections: query, key, value, output, gate, up, down


@dataclass(frozen=True)
class ItemMemoryConfig:
    """A linear item-item model (SLIT) beside the matching head, fitted in closed form when training is over."""

    past: int = 0  # newest events of a history that it reads; 0 = no item memory
    future: int = 5  # events that are predicted from one place of a training history
    l2: float = 0.0  # ridge; 0 = chosen on validation
    weights: tuple[float, ...] = ()  # of its scores beside the logits, for I0, I1 and I2; () = chosen on validation
    prior_weight: float = 0.0  # of log popularity where a prompt tells nothing; chosen on validation with ``weights``
    links: int = 512  # largest weights that are kept of each item


@dataclass(frozen=True)
class WishWordsConfig:
    """Words of a wish looked up in the items' documents (BM25), beside the matching head."""

    enabled: bool = False
    weights: tuple[
        float, ...
    ] = ()  # of the match beside the logits, without and with a history; () = chosen on validation


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama shape with item tokens, or a published model (``pretrained``).

    From 1 M to 70 B parameters by these numbers alone. With ``pretrained`` the numbers of the shape come from its config.json.
    """

    pretrained: str = ""  # folder, known name or hub id of a published model; "" = train from scratch
    adapter: AdapterConfig = AdapterConfig()
    quantise: Literal["none", "int8", "nf4"] = "none"  # the frozen weights of the layers
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # of frozen weights that are not quantised
    # What learns: "all", or any of "adapter", "items" (item and feature tokens, matching head), "embeddings" (words and their head).
    trainable: tuple[str, ...] = ("all",)
    chat: Literal["auto", "none"] = "auto"  # the chat template of a published model, if it has one

    @property
    def residual_dropout(self) -> float:
        """``dropout``, or its default: what keeps a small model from learning its logs by heart harms a published one."""
        return self.dropout if self.dropout is not None else 0.0 if self.pretrained else 0.3

    @property
    def uses_items(self) -> bool:
        """Whether there are item tokens and the matching head: always from scratch, and beside a published model if they learn."""
        return not self.pretrained or "all" in self.trainable or "items" in self.trainable

    width: int = 64  # D
    layers: int = 2  # L
    heads: int = 2  # N
    kv_heads: int = 2  # K
    head_size: int = 32  # H
    mlp_width: int = 128  # F
    vocab_size: int = 2048  # V, of the tokeniser that is trained on templates and catalogue
    tied_head: bool = True
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    # On embeddings and residual branches; null = 0.3 from scratch, 0 beside published weights
    dropout: float | None = None
    item_dropout: float = 0.1  # chance that an input item token is replaced by the unknown-item token
    rerank_head: bool = False  # a second head for short lists of candidates: P_i = softmax(θᵀσ(f_i + g) + β_i)
    item_memory: ItemMemoryConfig = ItemMemoryConfig()
    wish_words: WishWordsConfig = WishWordsConfig()
    # Logits of items without a training event above the mean bias of the rarest seen tenth; null = chosen on validation
    new_item_lift: float | None = None
    item_id_embedding: bool = True  # learned part of the item vector beside the content projection
    # Where the learned part of an item vector begins: small random values, or the word vectors of its title (published models)
    item_start: Literal["random", "titles"] = "random"
    # Chance per step that an item goes without its learned part and its co-occurrence: what is written about it learns to carry it
    item_id_dropout: float = 0.0
    content_features: int = 128  # width of the text features (TF-IDF + truncated SVD); 0 = none
    cooccurrence_features: int = 0  # width of collaborative features from the training split; 0 = none
    # Folder, known name or hub id of an encoder (minilm-l6) for further item features; "" = none
    text_encoder: str = ""
    scan_layers: bool = True
    # What of a layer is kept for the backward pass, from all to its input alone; offload: dots in the host's memory (models/remat.py).
    remat: Literal["none", "dots", "qkv", "attention", "full", "least", "offload"] = "none"
    # Scanned layers that keep one input between them in training, not one each: 28 in groups of 4 keep 7 + 4, and are computed forward
    # once more. Divides their number; 1 = each keeps its own.
    layer_group: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"  # compute; parameters are float32
    # Scores of queries and keys in memory ("reference") or in a kernel on the chip ("fused"; away from TPUs it is interpreted, for
    # tests). "auto" = fused on TPUs, cuDNN's on NVIDIA GPUs in bfloat16. What these cannot do goes the reference's way: see
    # models/attention.py: attend.
    attention: Literal["auto", "reference", "fused"] = "auto"


# ------------------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class MeshConfig:
    """Device mesh. An axis of size 1 stays. -1 on one axis takes the remaining devices."""

    replica: int = 1
    fsdp: int = -1
    tensor: int = 1
    # Like v5e-16: what `instructrec plan` and tools/aot_check.py assume; a run takes the devices that it finds
    chips: str = ""


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation, logging and checkpoints. All lengths of time are in steps."""

    steps: int = 1500
    optimizer: Literal["adamw", "adafactor", "lion", "muon"] = "adamw"  # muon: the layers' matrices; adamw for the rest
    # After the warm-up; wsd: constant, then linear decay
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    batch_size: int = 32  # B, packed rows per step over all devices
    sequence_length: int = 128  # S, tokens per packed row
    # Examples that wait where no row has room, while those behind them fill the rows (data/packing.py). 0 = the batch ends there
    look_ahead: int = 0
    # Task, as named in the log, to the epoch at which it begins: {search: 0.5, rerank: 1}. The others begin at 0 (data/curriculum.py).
    curriculum: dict[str, float] = field(default_factory=dict, hash=False)
    accumulate: int = 1  # micro-batches per step, combined by sums and weights
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    final_lr_fraction: float = 0.05
    decay_fraction: float = 0.2  # wsd: share of the steps, at the end, in which the rate falls
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.98
    momentum: float = 0.95  # muon
    clip_norm: float = 1.0
    ema: float = 0.0  # decay per step of a running mean of the weights, which validation and export then take; 0 = none
    z_loss: float = 0.0  # weight of the mean squared log normaliser of the word and item logits
    label_smoothing: float = 0.0  # over the catalogue, on the item loss
    # Over the whole catalogue, or on sampled negatives where that is too large (training/sampled.py)
    item_loss: Literal["full", "sampled", "gbce"] = "full"
    item_negatives: int = 1024  # sampled, gbce: negatives of a step, shared by its positions
    item_negatives_by: Literal["uniform", "popularity"] = "uniform"
    gbce_calibration: float = 0.75  # gbce: 0 = plain binary cross-entropy, 1 = all overconfidence is taken back
    item_loss_weight: float = 1.0
    text_loss_weight: float = 0.3
    rerank_loss_weight: float = 1.0  # where there is a re-ranking head
    rerank_candidates: int = 20  # C of its loss: the target, and what the matching head ranks highest beside it
    # Share of the matching head's probabilities in what it learns; the rest is the target's
    rerank_teacher: float = 0.0
    logits_chunk: int = 16  # sequence positions whose logits exist at one time
    vocab_tiles: int = 1  # parts of the word table, of which one is gathered at a time for the loss on words
    log_every: int = 25
    eval_every: int = 150  # validation NDCG@10, full ranking; the best step is kept
    eval_users: int = 2000  # at most this many validation users while training (a fixed sample)
    # What validation measures: the item head on full rankings, or the likelihood of titles on 1+9 candidates. "auto" = the item
    # head if there is one.
    eval_method: Literal["auto", "items", "likelihood"] = "auto"
    checkpoint_every: int = 150
    keep: int = 2  # latest checkpoints kept beside the best one
    keep_every: int = 0  # checkpoints of every so many steps are kept for good; 0 = none
    writers: tuple[str, ...] = ("tensorboard",)  # beside metrics.jsonl: tensorboard, wandb, mlflow, or a package's own
    seed: int = 0


@dataclass(frozen=True)
class ProfileConfig:
    """A window of training steps that JAX's profiler traces into ``RUN_DIR/profile``."""

    start: int = 10  # first step of the window, counted from the first of this call
    steps: int = 0  # length of the window; 0 = none


@dataclass(frozen=True)
class EvaluateConfig:
    """What ``instructrec evaluate`` measures."""

    protocol: Literal["full", "1+9", "1+99"] = "full"
    cutoffs: tuple[int, ...] = (1, 3, 5, 10, 20)
    negatives: Literal["uniform", "popularity", "file"] = "uniform"
    negatives_file: str = ""  # file: lists of a retriever; the first of a user's list are the negatives
    negatives_seed: int = 0
    bootstrap: int = 2000  # resamples of users for the 95 % intervals
    batch_size: int = 64
    likelihood_users: int = 200  # users scored by the text likelihood too (slow); 0 = none
    wording_cases: int = 300  # cases asked by every held-out wording too; 0 = none
    before_tuning: bool = True  # pretrained: the likelihood table also has the model as it was published
    # Beside them stands every baseline that `instructrec baseline` has tuned on the same data
    baselines: tuple[str, ...] = ("popularity", "itemknn", "ease", "ease_last10", "slit", "bm25")


@dataclass(frozen=True)
class TeacherConfig:
    """Who writes preferences (P2) and vague intentions (I1) in words, and what it may cost. Decides nothing of prepared data."""

    backend: Literal["openai", "local", "rules"] = "rules"  # an OpenAI-compatible endpoint, a model of ours, or rules
    model: str = ""  # openai: the endpoint's name of it; local: folder, known name or hub id
    base_url: str = ""  # openai: e.g. http://localhost:8000/v1; "" = the client library's own
    api_key_env: str = "OPENAI_API_KEY"  # name of the environment variable that holds the key
    # Form of an answer; auto: JSON from an endpoint, a sentence from a local model
    answer: Literal["auto", "json", "text"] = "auto"
    history_items: int = 20  # most events shown of a history, the newest
    temperature: float = 0.7
    max_output_tokens: int = 120  # per answer
    concurrency: int = 8  # requests to the endpoint at one time
    timeout: float = 60.0  # seconds for one answer
    retries: int = 5  # after a time-out, a broken connection, 408, 409, 429 or 5xx
    backoff: float = 0.5  # seconds before the first retry, doubled each time; Retry-After has precedence
    repairs: int = 1  # further questions, with the complaint, after an answer that does not pass
    max_tokens_total: int = 0  # budget of prompt and answer tokens over all commands on one folder; 0 = none
    max_money: float = 0.0  # budget in the currency of the prices; 0 = none
    price_per_million_in: float = 0.0  # of prompt tokens
    price_per_million_out: float = 0.0  # of answer tokens
    min_words: int = 4  # of a text; two Chinese characters count as a word
    max_words: int = 60
    # Refuse a text whose 3-word shingles overlap (Jaccard) an earlier one's by this much; 0 = off
    near_duplicate: float = 0.8
    seed: int = 0  # of the order in which places are taught, and of the sampling


@dataclass(frozen=True)
class BaselineConfig:
    """The tuning budget of every baseline: the same for all, and written into their results."""

    trials: int = 6  # settings tried at most, the defaults first; each is judged by validation NDCG@10, full ranking
    seed: int = 0  # of the draws of settings, and of what is random in a fit
    epochs: int = 200  # trained by gradients: most passes over the events
    patience: int = 10  # trained by gradients: passes without a better validation NDCG@10 before a fit ends
    valid_users: int = 2000  # at most this many validation cases after each pass (a fixed sample); trials use all
