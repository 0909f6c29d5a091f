"""``instructrec plan``: what a training step of a config takes, before anyone pays for a chip."""

from __future__ import annotations

import numpy as np

from instructrec_jax import prepare
from instructrec_jax.config import Config
from instructrec_jax.data.records import Records
from instructrec_jax.data.tokenise import encode_example
from instructrec_jax.errors import DataError
from instructrec_jax.models import adapters
from instructrec_jax.training import xla_flags
from instructrec_jax.training.chips import CHIPS, Chip, topology_of
from instructrec_jax.training.log import PEAKS
from instructrec_jax.training.plan import Plan, make_plan
from instructrec_jax.training.shapes import architecture_of

SAMPLE = 500  # examples whose tokens are counted


def plan(config: Config, chips: str = "", *, items: int = 0, users: int = 0) -> Plan:
    """The plan of a config on named chips, or on the devices of this machine.

    Args:
        config: sizes of its tables come from its prepared data, if that is there.
        chips: like ``v5e-16``; "" = the config's ``mesh.chips``, or else what this machine has.
        items, users: of data that is not prepared yet, where the model has item tokens.

    Raises:
        ConfigError: the settings do not fit together or do not divide over the mesh. UserError: unknown chips or model.
    """
    adapters.check(config.model)
    tokens = None
    try:
        prepared = prepare.load(config)
    except DataError:  # a plan needs no data
        pass
    else:
        items, users = prepared.data.num_items, len(prepared.users.names)
        tokens = _tokens(prepared, config.train.sequence_length)
    arch, sizes = architecture_of(config, items, users)
    name = chips or config.mesh.chips
    if name:
        topology = topology_of(name)
        return make_plan(config, arch, sizes, topology.chips, topology.chip, tokens_per_epoch=tokens)
    devices, chip = _here()
    return make_plan(config, arch, sizes, devices, chip, fused=_tpu(), tokens_per_epoch=tokens)


def _tokens(prepared: prepare.Prepared, length: int) -> int:
    """Tokens of all training examples, cut to ``length``, from a sample spread over them."""
    records = Records(prepared.records)
    picked = np.unique(np.linspace(0, len(records) - 1, min(SAMPLE, len(records))).astype(int))
    sizes = [min(len(encode_example(records[int(i)], prepared.text)["tokens"]), length) for i in picked]
    return round(float(np.mean(sizes)) * len(records))


def _here() -> tuple[int, Chip | None]:
    """Number of devices of this machine, and what they are if it is known."""
    import jax

    xla_flags.apply()  # this starts the backend, and whoever plans may train in the same process
    device = jax.devices()[0]
    kind = device.device_kind.lower()
    peak = next((peak for name, peak in PEAKS.items() if name in kind), None)
    known = next((chip for chip in CHIPS.values() if chip.peak == peak), None)
    return jax.device_count(), known


def _tpu() -> bool:
    import jax

    return jax.devices()[0].platform == "tpu"
