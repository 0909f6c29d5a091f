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
