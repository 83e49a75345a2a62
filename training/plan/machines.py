"""The GPUs that a run can be planned for. What is not said to be measured is what its maker publishes."""

from __future__ import annotations

import re
from typing import NamedTuple

from infra.config import nearest
from infra.errors import SettingsError

GB, TERA = 1e9, 1e12
MOST = 100_000  # ranks of a plan


class Device(NamedTuple):
    name: str
    memory: float | None  # bytes: its maker's GB as 10^9, which is a little less than there is; None: not known
    bf16: float | None  # dense FLOP/s
    fp32: float | None  # without TF32, which training does not turn on
    bf16_measured: bool = False

    @property
    def gpu(self) -> bool:
        return self.memory is not None


class Machines(NamedTuple):
    ranks: int
    device: Device

    def __str__(self) -> str:
        return f"{self.ranks} x {self.device.name}"


DEVICES = {
    device.name: device
    for device in (
        Device("B200", 180 * GB, 2250 * TERA, 75 * TERA),
        Device("H200", 141 * GB, 790 * TERA, 67 * TERA, bf16_measured=True),
        Device("H100", 80 * GB, 989 * TERA, 67 * TERA),
        Device("A100-80", 80 * GB, 312 * TERA, 19.5 * TERA),
        Device("A100-40", 40 * GB, 312 * TERA, 19.5 * TERA),
        Device("L40S", 48 * GB, 362 * TERA, 91.6 * TERA),
        Device("RTX4090", 24 * GB, 165 * TERA, 82.6 * TERA),
        Device("cpu", None, None, None),  # they differ too much for one figure
    )
}


def machines(text: str) -> Machines:
    """`16xH200`, or a name alone for one."""
    match = re.fullmatch(r"(?:([0-9]{1,6})\s*[xX*]\s*)?([A-Za-z][\w -]{0,30})", text.strip())
    if match is None or not 1 <= (ranks := int(match[1] or 1)) <= MOST:
        raise SettingsError(
            f"`{text[:60]}` does not say which GPUs and how many",
            remedy=f"write a number from 1 to {MOST:,}, an x and a name, such as 16xH200",
        )
    return Machines(ranks, _device(match[2]))


def device_called(name: str) -> Device | None:
    """The known device that a driver calls, say, `NVIDIA H100 80GB HBM3`; its memory may be another."""
    known = [device for device in DEVICES.values() if _plain(device.name.partition("-")[0]) in _plain(name)]
    return known[0] if known else None


def _device(name: str) -> Device:
    plain = {_plain(known): device for known, device in DEVICES.items()}
    if _plain(name) in plain:
        return plain[_plain(name)]
    known = ", ".join(DEVICES)
    near = nearest(_plain(name), plain)
    hint = f"did you mean {plain[near].name}? Known" if near else "known"
    raise SettingsError(
        f"nothing is known here of a GPU called `{name.strip()}`",
        remedy=f"{hint} are {known}; or take the one nearest to it and say its speed with --peak-tflops",
    )


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower().removesuffix("gb")
