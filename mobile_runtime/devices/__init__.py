"""Where a job folder runs. `python -m mobile_runtime devices` lists what is there.

    local           this machine, in a process of its own
    arm64           an emulated Arm processor
    ssh:HOST        a computer that ssh reaches
    adb:SERIAL      an Android phone with the sample app
    ios:UDID        an iPhone with the sample app, from a Mac
    folder:DIR      somebody else's: DIR/job goes to the device, its result comes back as DIR/result

Every device brings a result folder as far as it can, and tells for each task that has no record
why. Nothing that was measured is lost: the next run asks only for what is missing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from mobile_runtime.bundle import Bundle
from mobile_runtime.errors import UserError, choices
from mobile_runtime.runs import NoRun

DEFAULT_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Work:
    """One job for a device. job, result: folders; the result may hold records already.

    timeout_s: a device that has given no record for so long is given up. tell: what is going on.
    """

    bundle: Bundle
    job: Path
    result: Path
    timeout_s: float = DEFAULT_TIMEOUT_S
    tell: Callable[[str], None] = lambda text: None


Troubles = dict[str, NoRun]
"""Of each task that has no sound record: why."""


class Device(Protocol):
    """A place that runs jobs."""

    @property
    def name(self) -> str:
        """As users name it."""
        ...

    def obstacle(self) -> str | None:
        """Why it cannot run a job now, and what to do; None if it can, as far as can be seen."""
        ...

    def run(self, work: Work) -> Troubles:
        """Bring the result as far as the device goes."""
        ...


@runtime_checkable
class Cleaned(Device, Protocol):
    """A device that keeps what it was sent, until it is told not to."""

    def clean(self) -> None:
        """Remove all of it. LostError where the device does not answer."""
        ...


def find(name: str) -> Device:
    """A device by its name. UserError for an unknown kind, with those that there are."""
    from mobile_runtime.devices.adb import AdbDevice
    from mobile_runtime.devices.arm64 import arm64
    from mobile_runtime.devices.folder import FolderDevice
    from mobile_runtime.devices.ios import IosDevice
    from mobile_runtime.devices.processes import local
    from mobile_runtime.devices.ssh import SshDevice

    kind, colon, rest = name.partition(":")
    if kind == "local" and not colon:
        return local()
    if kind == "arm64" and not colon:
        return arm64()
    if kind == "adb":
        return AdbDevice.named(rest)
    if kind == "ios":
        return IosDevice.named(rest)
    if kind == "ssh":
        return SshDevice.named(rest)
    if kind == "folder":
        if not rest:
            raise UserError("the device folder needs a path; write folder:DIR")
        return FolderDevice(Path(rest))
    raise choices("device", name, list(KINDS))


def clean(name: str) -> str:
    """Remove the bundles, jobs and results that lie on a device; what was done, as a sentence.

    UserError where that cannot be done from here.
    """
    from mobile_runtime.devices.transfers import LostError

    device = find(name)
    if not isinstance(device, Cleaned):
        raise UserError(f"{name}: nothing lies there that can be removed from here")
    if obstacle := device.obstacle():
        raise UserError(f"{name}: {obstacle}")
    try:
        device.clean()
    except LostError as error:
        raise UserError(f"{name}: {error}") from error
    return f"{device.name} holds no bundles, jobs or results any more"


def there() -> list[Device]:
    """The devices that need no name of the user's, available or not."""
    from mobile_runtime.devices import adb
    from mobile_runtime.devices.arm64 import arm64
    from mobile_runtime.devices.processes import local

    return [local(), arm64(), *(adb.AdbDevice(serial) for serial in adb.devices())]


KINDS = {
    "local": "this machine, in a process of its own",
    "arm64": "an emulated Arm processor: are its INT8 kernels right? (--setup arm64 first)",
    "ssh:HOST[,python=PATH]": "a computer that ssh reaches, say a Mac or an Arm board",
    "adb[:SERIAL[,app=PACKAGE]]": "an Android phone with an app that takes jobs (JOBS.md)",
    "ios:UDID[,app=BUNDLE_ID]": "an iPhone with such an app, from a Mac with Xcode",
    "folder:DIR": "results gathered by hand: DIR/job goes to the device, DIR/result comes back",
}
