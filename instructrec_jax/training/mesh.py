"""One device mesh, made in one place: ``("replica", "fsdp", "tensor")``, explicit axes, size-1 axes kept."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import AxisType

from instructrec_jax.config import MeshConfig
from instructrec_jax.errors import ConfigError
from instructrec_jax.models.sharding import MESH_AXES


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
            raise ConfigError(
                f"mesh axes {sizes} do not divide {devices} devices",
                remedy=f"their product {fixed} must divide {devices}",
            )
        sizes[free[0]] = devices // fixed
    elif fixed != devices:
        raise ConfigError(f"the mesh {sizes} needs {fixed} devices, there are {devices}", remedy="set one axis to -1")
    return sizes


def make_mesh(config: MeshConfig, devices: list | None = None) -> jax.sharding.Mesh:
    """The mesh over all (or the given) devices; activate it with ``jax.set_mesh(mesh)``."""
    devices = devices if devices is not None else jax.devices()
    sizes = mesh_sizes(config, len(devices))
    # axis_types is always named: its default has changed between JAX versions.
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Explicit,) * 3, devices=devices)


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
