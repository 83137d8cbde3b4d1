"""What the emulator says when a kernel is wrong, or when the emulator cannot run it."""


class EmulatorError(Exception):
    """Anything that stops the emulation. `where` is filled in by the scheduler."""

    where = ""

    def __str__(self) -> str:
        return super().__str__() + self.where


class Unsupported(EmulatorError):
    """An instruction, a form of one, or a construct that the emulator does not know."""


class Finding(EmulatorError):
    """A mistake in the kernel, of one of the kinds in KINDS."""

    KINDS = {
        "deadlock": "every thread waits and no asynchronous operation is under way",
        "livelock": "more instructions than the limit",
        "out-of-bounds": "an access outside every registered buffer, the CTA's shared memory "
        "or the allocated columns of tensor memory",
        "misaligned": "an address that the access size or the instruction does not allow",
        "mbarrier": "a barrier object used before init, over-arrived, overwritten, or left "
        "with bytes outstanding",
        "barrier": "bar.sync counts that cannot match",
        "launch": "a launch that the hardware refuses, or registers that it does not have",
        "exited": "shared memory of another CTA of the cluster touched after that CTA has ended",
        "dependence": "a buffer of the kernel before touched before griddepcontrol.wait",
        "proxy-fence": "the asynchronous proxy reads bytes that a thread wrote, with no "
        "fence.proxy.async in between",
        "async-wait": "a register touched while an asynchronous instruction still owns it",
        "divergent": "a warp-collective instruction reached by a part of the warp",
        "tensor-order": "tensor memory touched after another warp or the MMA pipe, with no "
        "tcgen05.fence between",
        "tmem": "tensor memory allocated, used or freed against the rules",
        "descriptor": "a tensor map, matrix or instruction descriptor that is not valid",
    }

    def __init__(self, kind: str, message: str):
        assert kind in self.KINDS, kind
        super().__init__(f"{kind}: {message}")
        self.kind = kind
