"""One device mesh, made in one place: ``("replica", "fsdp", "tensor")``, explicit axes, size-1 axes kept.

Over several TPU slices the mesh is a hybrid one: ``replica`` crosses the data-centre network, which then carries one sum of gradients a
step; ``fsdp`` and ``tensor`` stay inside a slice.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType

from instructrec_jax.config import Config, MeshConfig, ModelConfig
from instructrec_jax.errors import ConfigError
from instructrec_jax.models.architecture import Architecture
from instructrec_jax.models.heads import Sizes
from instructrec_jax.models.sharding import MESH_AXES, check_divides
from instructrec_jax.training.tiles import check_tiles


def mesh_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """Axis sizes for a number of devices, with -1 resolved.

    Raises:
        ConfigError: more than one -1, or the product is not the number of devices.
    """
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(free) > 1:
        raise ConfigError(f"only one mesh axis may be -1, not {' and '.join(free)}")
    if free:
        if devices % fixed:
            nearest = max(n for n in range(1, fixed + 1) if devices % n == 0)
            raise ConfigError(
                f"mesh axes {sizes} do not divide {devices} devices",
                remedy=f"their product {fixed} must divide {devices}; the nearest that does is {nearest}",
            )
        sizes[free[0]] = devices // fixed
    elif fixed != devices:
        # With one axis changed: fsdp if that can be, for it costs the model nothing.
        rest = {axis: fixed // size for axis, size in sizes.items()}
        able = [axis for axis in ("fsdp", "replica", "tensor") if devices % rest[axis] == 0]
        other = f"mesh.{able[0]} = {devices // rest[able[0]]} needs {devices}; or " if able else ""
        raise ConfigError(
            f"the mesh {sizes} needs {fixed} devices, there are {devices}", remedy=f"{other}set one axis to -1"
        )
    return sizes


def check_plan(config: Config, arch: Architecture, sizes: Sizes, devices: int) -> dict[str, int]:
    """Axis sizes for a number of devices, after checking that all of a training step divides.

    Raises:
        ConfigError: something does not: which axis, which number, and the nearest that works.
    """
    mesh, t = mesh_sizes(config.mesh, devices), config.train
    for name, parts in (("batch_size", "accumulate"), ("sequence_length", "logits_chunk")):
        number, by = getattr(t, name), getattr(t, parts)
        if number % by:
            nearest = max(n for n in range(1, by + 1) if number % n == 0)
            raise ConfigError(
                f"train.{name} = {number} does not divide by train.{parts} = {by}",
                remedy=f"the nearest train.{parts} that divides {number} is {nearest}",
            )
    check_group(config.model, arch)
    check_divides(arch, mesh, t.batch_size // t.accumulate, sizes.tables)
    check_tiles(sizes.vocab, t.vocab_tiles, mesh["tensor"])
    return mesh


def check_group(model: ModelConfig, arch: Architecture) -> None:
    """Refuse groups of layers that do not divide.

    Raises:
        ConfigError: naming the nearest number that does.
    """
    group = model.layer_group
    for layers in (arch.layers, arch.encoder_layers):
        if group < 1 or layers % group:
            nearest = max(n for n in range(1, max(group, 1) + 1) if layers % n == 0)
            raise ConfigError(
                f"{layers} layers do not divide into groups of model.layer_group = {group}",
                remedy=f"the nearest number that divides them is {nearest}",
            )
    if group > 1 and not model.scan_layers:
        raise ConfigError(
            f"model.layer_group = {group}, but the layers are not scanned",
            remedy="set model.scan_layers: true, or model.layer_group: 1",
        )


def make_mesh(config: MeshConfig, devices: list | None = None) -> jax.sharding.Mesh:
    """The mesh over all (or the given) devices; activate it with ``jax.set_mesh(mesh)``.

    Raises:
        ConfigError: the axes do not fit the number of devices, or ``replica`` the number of slices.
    """
    devices = devices if devices is not None else jax.devices()
    sizes = mesh_sizes(config, len(devices))
    shape = (sizes["replica"], sizes["fsdp"], sizes["tensor"])
    # axis_types is always named: its default has changed between JAX versions.
    types = (AxisType.Explicit,) * 3
    slices = slices_of(devices)
    if slices > 1:
        return jax.sharding.Mesh(hybrid_grid(shape, slices, devices), MESH_AXES, axis_types=types)
    return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices)


def slices_of(devices: list) -> int:
    """Number of TPU slices. Other devices have none: JAX numbers the hosts of GPUs there."""
    return len({getattr(d, "slice_index", 0) for d in devices if d.platform == "tpu"}) or 1


def hybrid_grid(shape: tuple[int, ...], slices: int, devices: list) -> np.ndarray:
    """Devices ``[replica, fsdp, tensor]`` with every slice in replicas of its own.

    Raises:
        ConfigError: ``replica`` does not divide over the slices.
    """
    replica, fsdp, tensor = shape
    if replica % slices:
        raise ConfigError(
            f"mesh.replica = {replica} does not divide over {slices} slices: only replica may cross the network between slices",
            remedy=f"set mesh.replica to {slices} or a multiple of it",
        )
    return mesh_utils.create_hybrid_device_mesh((replica // slices, fsdp, tensor), (slices, 1, 1), devices=devices)


def data_slice(mesh: jax.sharding.Mesh) -> tuple[int, int]:
    """(index, number) of the slice of every batch that this process reads.

    Usually each process reads its own; processes whose devices hold the same rows, because a ``tensor`` axis spans them, read the same.

    Raises:
        ConfigError: the rows of two processes overlap without being the same.
    """
    rows: dict[int, set[int]] = {}
    for (replica, fsdp, _), device in np.ndenumerate(mesh.devices):
        rows.setdefault(device.process_index, set()).add(replica * mesh.devices.shape[1] + fsdp)
    slices = sorted({tuple(sorted(own)) for own in rows.values()})
    if (
        len({len(own) for own in slices}) > 1
        or len(slices) * len(slices[0]) != mesh.devices.shape[0] * mesh.devices.shape[1]
    ):
        raise ConfigError(
            f"the mesh {dict(mesh.shape)} cuts the batch across its {len(rows)} processes: they hold the shards {slices}",
            remedy="let mesh.tensor divide the devices of a process, or be a multiple of them",
        )
    return slices.index(tuple(sorted(rows[jax.process_index()]))), len(slices)
