"""What a call is being compiled for."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Target:
    """A device, there or not.

    Attributes:
      platform: 'gpu', 'cpu' or 'tpu'.
      kind: the vendor's name, 'NVIDIA H200'.
      cores: multiprocessors of a GPU; 1 of a CPU.
    """

    platform: str
    kind: str
    cores: int

    @property
    def hopper(self) -> bool:
        """Compute capability 9.0: H100, H200, H800, GH200."""
        return self.platform == "gpu" and any(
            name in self.kind for name in ("H100", "H200", "H800", "H20", "GH200")
        )


def target() -> Target:
    """The device that the trace under way is for: the abstract mesh's if one is set (a deviceless
    compile), else JAX's default device."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None and abstract.num_cores is not None:
        return Target(abstract.platform or "gpu", abstract.device_kind, abstract.num_cores)
    device = jax.config.jax_default_device
    if device is None or isinstance(device, str):  # a string names a platform
        device = jax.local_devices(backend=device)[0]
    return Target(device.platform, device.device_kind, getattr(device, "core_count", 1))


def require_hopper() -> Target:
    """The target, if Mosaic's Hopper kernels run there.

    Raises:
      NotImplementedError: they do not.
    """
    found = target()
    if not found.hopper:
        raise NotImplementedError(
            f"it needs an NVIDIA GPU of compute capability 9.0, not {found.kind}"
        )
    return found
